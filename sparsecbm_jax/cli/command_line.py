"""What the commands share: `--config` with its overrides, `--model`, `--help`, and messages for people."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import logging as standard_logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.config.run_config import RunConfig, from_config_dict, key_names, setting_type, unknown_key
from sparsecbm_jax.runtime import memory

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent
# Config files import their siblings as `configs.common`, from whatever folder a command is started.
if (CHECKOUT / "configs" / "common.py").is_file() and str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))

FLAGS = flags.FLAGS
flags.DEFINE_bool("debug", False, "Show the traceback of an error, not only its message.")

OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=]+)(?:=(?P<value>.*))?", re.DOTALL)
CONFIG = re.compile(r"--?config(?:=(?P<value>.*))?", re.DOTALL)

# What is read in place of sys.argv, and the settings that it sets to None.
_arguments: list[str] = []
_set_to_none: list[str] = []
# The config file where the command line names none, and what messages say of flags of earlier versions.
_default_config: list[str] = []
_former_flags: dict[str, str] = {}


def define_config(default: Path | None = None) -> None:
    """Defines `--config=FILE[:ARGUMENT]`, with `--config.SECTION.KEY=VALUE` for every setting.

    Args:
        default: config file where the command line names none.
    """
    _default_config[:] = [] if default is None else [str(default)]
    config_flags.DEFINE_config_file(
        "config", None, "Config file; --config.SECTION.KEY=VALUE changes a setting.", sys_argv=_arguments
    )


def define_model() -> None:
    """Defines `--model`, the folder of a saved model."""
    flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/quickstart/model.")


def define_former_flags(**hints: str) -> None:
    """Has the messages about flags of earlier versions say what took their place.

    Args:
        **hints: by name of a flag that no longer exists, the end of the message.
    """
    _former_flags.update(hints)


def has_config() -> bool:
    """Returns whether the command line names a config file."""
    flag = FLAGS["config"]
    return flag.value is not None and config_flags.get_config_filename(flag) not in _default_config


def run_config(settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Returns the validated settings of `--config` and its overrides.

    Args:
        settings: what other flags say, by dotted name; it counts more than the config file and less than an override.

    Raises:
        ValueError: No config file is given, or a setting is unknown or out of range.
    """
    if FLAGS["config"].value is None:
        expected = f"one of {', '.join(_config_files())}" if _config_files() else "a config file"
        raise ValueError(f"--config is missing; expected {expected}")
    config = FLAGS.config
    overridden = config_flags.get_override_values(FLAGS["config"])
    changes = {key: value for key, value in (settings or {}).items() if key not in overridden}
    changes |= dict.fromkeys(_set_to_none)
    with config.unlocked():
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
    return from_config_dict(config)


def model_folder() -> str:
    """Returns the folder that `--model` names.

    Raises:
        ValueError: `--model` is missing.
    """
    if not FLAGS.model:
        raise ValueError("--model is missing; expected the folder of a saved model, such as runs/quickstart/model")
    return FLAGS.model


def claim_file(path: str | Path) -> None:
    """Makes a file that is written at the end, so that one that cannot be written costs no work.

    Raises:
        OSError: The file cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


def numbers(flag: str, kind: type[float] | type[int]) -> list[Any]:
    """Returns the values of a list flag as distinct numbers, in their order.

    Raises:
        ValueError: One is no such number, or there is none.
    """
    given = FLAGS[flag].value or []
    try:
        found = list(dict.fromkeys(kind(value) for value in given))
    except ValueError:
        found = []
    if not found:
        what = "integers" if kind is int else "numbers"
        raise ValueError(f"--{flag}={','.join(given)}: expected {what} with commas")
    return found


def check_names(flag: str, known: Iterable[str]) -> None:
    """Raises ValueError where a value of a list flag is not known, with the nearest that is."""
    names = list(known)
    for value in FLAGS[flag].value or []:
        if value not in names:
            hint = did_you_mean(value, names, "did you mean {}?") or f"expected some of {', '.join(names)}"
            raise ValueError(f"--{flag}: there is no {value!r}; {hint}")


def present(module: types.ModuleType, text: str) -> None:
    """Has `--help` print a text and the flags of a module, in place of those of the file that was started."""
    sys.modules["__main__"].__doc__ = text
    for flag in FLAGS.get_key_flags_for_module(module.__name__):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def run(main: Callable[[], None], *, takes_arguments: bool = False, keeps_memory: bool = True) -> NoReturn:
    """Parses the command line and calls `main`; an error meant for a person ends with its message and status 2.

    Args:
        main: the function to call.
        takes_arguments: whether it reads arguments that belong to no flag, which are refused otherwise.
        keeps_memory: whether freed memory is kept: for a main that repeats one program; see `runtime.memory`.
    """
    # Below a warning, libraries only say which accelerators this machine has not.
    logging.set_verbosity(logging.WARNING)
    # One of them is that PyTorch, which nothing here needs, is not installed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.get_absl_handler().setFormatter(PlainFormatter())
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A review may hold characters that this terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    (memory.keep_freed if keeps_memory else memory.give_back_freed)()
    _choose_code_generator()
    try:
        app.run(lambda argv: main(), flags_parser=functools.partial(_parse, takes_arguments=takes_arguments))
    except BrokenPipeError:
        # Whoever read the output (`| head`) has had enough; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv or not _is_for_people(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _choose_code_generator() -> None:
    """Has XLA compile for the CPU with its older code generator, which takes about two thirds of the time.

    That was seen with the gradients of the quickstart's MiniLM, which run no slower. A compiler that does not know a
    flag ends the process, so other versions than the one that was measured are left alone, and TPUs.
    """
    flag, given = "--xla_cpu_use_fusion_emitters", os.environ.get("XLA_FLAGS", "")
    may_be_tpu = importlib.util.find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS") != "cpu"
    if flag not in given and not may_be_tpu and importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] = f"{given} {flag}=false".strip()


class PlainFormatter(standard_logging.Formatter):
    """Writes "warning: message", as errors are shown."""

    def format(self, record: standard_logging.LogRecord) -> str:
        """Formats a record."""
        return f"{record.levelname.lower()}: {record.getMessage()}"


def _parse(argv: Sequence[str], *, takes_arguments: bool) -> list[str]:
    try:
        _arguments[:] = _prepare(argv) if "config" in FLAGS else argv
        program, *rest = typing.cast(list[str], FLAGS(_arguments))
    except SystemExit:
        # Only --help and its like end a program here; that absl has them end it with 1 reads as a failure.
        sys.exit(0)
    except flags.Error as error:
        cause: BaseException = error
        while earlier := cause.__cause__ or cause.__context__:
            cause = earlier
        if isinstance(cause, Exception) and _is_for_people(cause):
            raise cause from None
        raise ValueError(_explain(error)) from error
    if rest and not takes_arguments:
        raise ValueError(f"{' '.join(rest)!r} belongs to no flag; a value of several words wants quotes: --text='A B'")
    return [program, *rest]


def _prepare(argv: Sequence[str]) -> list[str]:
    """Checks and completes the config arguments, which ml_collections would take in fewer forms or refuse tersely.

    A misspelt key is named with the nearest one, `a,b` is a list where a list is expected, `none` is None where a
    setting may be that, and a config file is also found from the checkout.
    """
    _set_to_none.clear()
    program, *arguments = argv
    prepared = [program]
    if not any(CONFIG.fullmatch(argument) for argument in arguments):
        arguments[:0] = [f"--config={path}" for path in _default_config]
    while arguments:
        argument = arguments.pop(0)
        if argument == "--":
            return [*prepared, argument, *arguments]
        if match := CONFIG.fullmatch(argument):
            value = match["value"] if match["value"] is not None else arguments.pop(0) if arguments else ""
            prepared.append(f"--config={_find_config(value)}")
        elif match := OVERRIDE.fullmatch(argument):
            key, value = match["key"], match["value"]
            hint = _setting_type(key)
            if value is None and hint is not bool and arguments:
                value = arguments.pop(0)
            prepared.extend(_override(match["no"] or "", key, value, hint))
        else:
            prepared.append(argument)
    # An override may be written before the file it overrides.
    return sorted(prepared, key=lambda arg: bool(OVERRIDE.fullmatch(arg)))


def _setting_type(key: str) -> Any:
    if key not in key_names():
        raise ValueError(unknown_key(key))
    return setting_type(key)


def _override(no: str, key: str, value: str | None, hint: Any) -> list[str]:
    if value is None:
        return [f"--{no}config.{key}"]
    if type(None) in typing.get_args(hint) and value.lower() == "none":
        _set_to_none.append(key)
        return []
    if hint == tuple[str, ...] and not value.lstrip().startswith(("(", "[")):
        value = repr(tuple(part.strip() for part in value.split(",") if part.strip()))
    if hint == tuple[float, ...] and not value.lstrip().startswith(("(", "[")):
        value = f"({value},)" if value.strip() else "()"
    return [f"--{no}config.{key}={value}"]


def _find_config(value: str) -> str:
    name, colon, argument = value.partition(":")
    path = Path(name)
    if not path.is_file():
        path = CHECKOUT / name
    if not path.is_file():
        files = _config_files()
        known = f"expected one of {', '.join(files)}" if files else "expected a Python file"
        raise ValueError(f"no config file {name!r}; " + (did_you_mean(name, files, "did you mean {}?") or known))
    return f"{path}{colon}{argument}"


def _config_files() -> list[str]:
    return sorted(f"configs/{path.name}" for path in (CHECKOUT / "configs").glob("*.py"))


def _explain(error: flags.Error) -> str:
    """Returns the message of an absl error, with the nearest flag of ours where one was misspelt."""
    if not isinstance(error, flags.UnrecognizedFlagError):
        return str(error)
    if error.flagname in _former_flags:
        return f"unknown flag --{error.flagname}; {_former_flags[error.flagname]}"
    known = [flag.name for flag in FLAGS.get_key_flags_for_module(sys.argv[0])]
    known += [name for name in ("config", "debug") if name in FLAGS]
    hint = did_you_mean(str(error.flagname).partition(".")[0], known, "; did you mean --{}?")
    return f"unknown flag --{error.flagname}{hint}"


def _is_for_people(error: Exception) -> bool:
    """Returns whether we raised it about something a person gave, rather than a library about something we did."""
    if type(error).__module__.partition(".")[0] == "sparsecbm_jax" or isinstance(error, OSError):
        return True
    # Python gives the import errors that it raises itself a name; those that ask to install an extra have none.
    if not isinstance(error, (ValueError, FloatingPointError, ImportError)) or getattr(error, "name", None):
        return False
    # JAX takes its own frames out of a traceback, and leaves a note that says so.
    if any("JAX has removed its internal frames" in note for note in getattr(error, "__notes__", ())):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    ours = (PACKAGE, CHECKOUT / "launch", CHECKOUT / "configs")
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(folder) for folder in ours)
