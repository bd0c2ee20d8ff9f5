"""Words and clauses of the embedded SYNTHETIC restaurant reviews; `reviews.py` puts them together.

Slots of a clause: `{s}` a subject, `{was}` its verb, `{it_was}` its pronoun with the verb; `{x}` a person or thing
that can act or be acted on; `{adj}` an adjective of the clause's polarity, `{anti}` one of the opposite, `{strong}` one
that no intensifier can stand before; `{very}` an intensifier or nothing; `{n}` a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


def _items(text: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in text.split("|"))


class Aspect(NamedTuple):
    """The words and clauses of one concept; pairs are (Negative, Positive).

    A subject that ends in '*' is plural, one that ends in '+' a person.
    """

    subjects: tuple[str, ...]
    actors: tuple[str, ...]
    adjectives: tuple[tuple[str, ...], tuple[str, ...]]
    strong: tuple[tuple[str, ...], tuple[str, ...]]
    clauses: tuple[tuple[str, ...], tuple[str, ...]]
    neutral: tuple[str, ...]


VERY = _items("||||very|really|rather|quite|truly|surprisingly|extremely|so")
NUMBERS = _items("twenty|thirty|forty|forty-five|fifty")
_PLAIN = (_items("bad|poor|disappointing|mediocre"), _items("good|great|lovely|impressive"))
_STRONG = (
    _items("awful|terrible|dreadful|a disgrace|a let-down|below par"),
    _items("excellent|wonderful|superb|fantastic|a delight|spot on"),
)

# These fit either polarity, because the adjective carries it.
STRAIGHT = _items(
    """{s} {was} {very} {adj} | {s} {was} {strong} | {s} {was} {adj} and {adj} | I found {s} {very} {adj}
    | we all thought {s} {was} {strong} | {s} {was} {adj} from start to finish | I have to say {s} {was} {very} {adj}
    | {s} once again {was} {strong} | to my mind {s} {was} {very} {adj}
    | what I remember is that {s} {was} {very} {adj}"""
)
NEGATED = _items(
    """{s} {was} not {anti} at all | {s} {was} anything but {anti} | {s} {was} far from {anti}
    | nobody could call {s} {anti} | {s} {was} by no means {anti} | I never once found {s} {anti}
    | I cannot say that {s} {was} {anti} | I would not call {s} {anti} | there was nothing {anti} about {s}"""
)
TURNED = _items(
    """{s} may once have been {anti}, but this time {it_was} {very} {adj}
    | I expected {s} to be {anti}, but {it_was} {strong} | a friend told me that {s} would be {anti}, yet {it_was} {adj}
    | last year {s} {was} {anti}; tonight {it_was} {very} {adj}
    | elsewhere in town everything is {anti}, but here {s} {was} {adj}"""
)
# Here a negation does not turn anything: 'could not have been more rude' is Negative.
EMPHATIC = _items(
    """{s} could not have been more {adj} | I have never known {s} so {adj} | there is no denying that {s} {was} {adj}
    | nothing prepared me for how {adj} {s} {was} | not for one moment did {s} stop being {adj}"""
)

# Short statements, as people type them; `{bare}` is a subject without its article.
PLAIN = _items(
    """{s} {was} {very} {adj} | {s} {was} {very} {adj} | {s} {was} {strong} | {s} {was} not {anti}
    | {s} {was} {adj} and {adj} | {adj} {bare} | I loved how {adj} {s} {was}"""
)
PLAIN_VERY = _items("||very|really|so|just")
PLAIN_CONTRAST = _items("{a}, but {b} | {a} but {b} | {a}, though {b}")
PLAIN_AGREEMENT = _items("{a} and {b} | {a}, and {b} | {a}, {b}")
# Subjects of short statements, beside the others.
PLAIN_SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "food": _items("the food | the food | the pizza | my dinner | our dishes* | the meal | the dish | the lunch"),
    "ambiance": _items("the decor | the atmosphere | the place | the interior | the room | the ambience"),
    "service": _items("our waiter+ | the waiter+ | our waitress+ | the staff+ | the service | our server+ | the host+"),
    "noise": _items("the music | the place | it | the room | the restaurant | the music | everything around us"),
}
PLAIN_ADJECTIVES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "food": (_items("cold|horrible|gross|undercooked|flavourless"), _items("amazing|yummy|perfect|delicious|good")),
    "ambiance": (_items("ugly|dirty|dark|boring|unpleasant"), _items("pretty|nice|beautiful|lovely|pleasant")),
    "service": (_items("slow|rude|too slow|unhelpful|lazy"), _items("nice|fast|friendly|great|sweet")),
    "noise": (_items("loud|too loud|noisy|too noisy|so loud"), _items("quiet|calm|nice and quiet|peaceful|not loud")),
}


ASPECTS: Mapping[str, Aspect] = {
    "food": Aspect(
        subjects=_items(
            """the soup | the lamb | the pasta | the steak | the fish | the curry | the salad | the risotto | the bread
            | the duck | the dumplings* | the tacos* | the noodles* | the fries* | the desserts* | the vegetables*
            | the chocolate cake | the seafood stew | the roast chicken | the mushroom pie | my main course
            | the starters*
            | the food | the food | everything on my plate | the omelette | the sauces* | the burger | the cooking"""
        ),
        actors=_items(
            """the soup | the lamb | the pasta | the steak | the fish | the curry | the risotto | the duck
            | my main course
            | the dumplings* | the noodles* | the vegetables* | the roast chicken | the mushroom pie | the starters*"""
        ),
        adjectives=(
            (*_items("bland|greasy|dry|soggy|stale|overcooked|salty|tough|tasteless|heavy|burnt"), *_PLAIN[0]),
            (*_items("tasty|fresh|delicious|flavourful|tender|juicy|crisp|well seasoned|satisfying|light"), *_PLAIN[1]),
        ),
        strong=_STRONG,
        clauses=(
            _items(
                """I left half of {x} on the plate | {x} came out cold in the middle
                | I have eaten better at a bus station
                | {x} tasted of nothing but salt | the kitchen clearly ruined {x} | {x} had been reheated once too often
                | not one of us finished {x} | the portions were tiny and without any taste"""
            ),
            _items(
                """I would order {x} again tomorrow | we scraped our plates clean | {x} melted on the tongue
                | {x} came out hot and full of flavour | the kitchen knows exactly what to do with {x}
                | I cannot stop thinking about {x} | not a crumb was left | we fought over the last bite of {x}"""
            ),
        ),
        neutral=_items(
            """we shared a starter and two mains | I ordered the lunch special | they serve pasta and grilled meat
            | my brother had the fish and I had the chicken | the menu changes every month | we only came for dessert"""
        ),
    ),
    "ambiance": Aspect(
        subjects=_items(
            """the dining room | the decor | the atmosphere | the interior | the lighting | the patio | the garden
            | the furniture | the setting | the mood of the place | the chairs and tables* | the walls* | the entrance
            | the ambiance | the upstairs room | the whole interior"""
        ),
        actors=_items("the decor | the atmosphere | the lighting | the setting | the interior | the dining room"),
        adjectives=(
            (*_items("shabby|gloomy|dated|cramped|dingy|cold|sterile|tacky|grubby|dull|uninviting|drab"), *_PLAIN[0]),
            (*_items("cosy|charming|elegant|inviting|stylish|romantic|warm|beautiful|tasteful"), *_PLAIN[1]),
        ),
        strong=_STRONG,
        clauses=(
            _items(
                """paint was peeling above our heads | it felt like eating in a waiting room
                | the carpet had seen better days
                | the lamps flickered all evening | {x} made me want to leave | our table wobbled under a bare bulb
                | somebody should redecorate soon | {x} did nothing for our appetite"""
            ),
            _items(
                """candles on every table set the mood | we could have sat there until midnight just to look around
                | {x} put us at ease at once | there were fresh flowers wherever I looked | {x} deserved a photograph
                | somebody with real taste decorated it | {x} made the evening feel special"""
            ),
        ),
        neutral=_items(
            """the place has two rooms and a bar | there is a terrace at the back | we sat near the window
            | the walls are painted blue | they moved into the old bank building last spring"""
        ),
    ),
    "service": Aspect(
        subjects=_items(
            """the waiter+ | our server+ | the staff+ | the hostess+ | the waitress+ | the service | the service
            | the manager+ | the bartender+ | the servers* | the people who looked after us* | the head waiter+
            | the young man at our table+"""
        ),
        actors=_items(
            "the waiter | our server | the waitress | the manager | the bartender | the young man at our table"
        ),
        adjectives=(
            (
                *_items("rude|slow|careless|clumsy|impatient|forgetful|unfriendly|inattentive|surly|sloppy|cold"),
                *_PLAIN[0],
            ),
            (*_items("friendly|attentive|helpful|polite|quick|patient|warm|professional|kind|cheerful"), *_PLAIN[1]),
        ),
        strong=_STRONG,
        clauses=(
            _items(
                """we waited {n} minutes before anyone took our order | {x} forgot our drinks twice
                | nobody came back to our table for {n} minutes | {x} sighed at every question
                | we had to ask three times for the bill | {x} brought us the wrong plates and shrugged
                | getting a glass of water took {n} minutes | {x} argued with us about the bill"""
            ),
            _items(
                """our glasses never stayed empty | {x} remembered us from last time
                | {x} had an answer to every question
                | we were seated and served within minutes | {x} brought the children crayons without being asked
                | a small mistake was put right at once and with a smile | {x} took good care of us"""
            ),
        ),
        neutral=_items(
            """a waiter took our order | you order at the counter | two servers looked after the room
            | somebody brought the bill after dessert | they wear green aprons"""
        ),
    ),
    # Every word here is about loudness: 'the terrace was awful' would not be about the noise.
    "noise": Aspect(
        subjects=_items(
            """the dining hall | the bar side | our corner | the terrace | the back room | the main room
            | the front room
            | the whole place | the upper floor | the tables around us* | the crowd at the bar"""
        ),
        actors=_items("the music | the radio | the crowd at the bar | the kitchen | the traffic outside"),
        adjectives=(
            _items("loud|noisy|deafening|rowdy|ear-splitting|hectic|raucous|boisterous"),
            _items("quiet|calm|peaceful|hushed|restful|tranquil|silent"),
        ),
        strong=(
            _items("louder than a factory|far too loud|all shouting and clatter|like the inside of a drum"),
            _items("as quiet as a library|a haven of peace|pleasantly quiet|never louder than a murmur"),
        ),
        clauses=(
            _items(
                """we had to shout across the table | {x} drowned out every word | my ears were ringing afterwards
                | I could not hear my own thoughts | a hen party screamed behind us all night
                | {x} roared from the minute we sat down | after an hour of that din I had a headache"""
            ),
            _items(
                """we could talk without raising our voices | {x} stayed politely in the background
                | you could hear every word across the table | even a full house kept its voice down
                | the thick curtains swallowed every sound | {x} could barely be heard from our table"""
            ),
        ),
        neutral=_items(
            """there was a radio playing somewhere | a band plays on the first Friday of the month
            | they have speakers in the ceiling | a party of ten sat behind us"""
        ),
    ),
}

FILLERS = _items(
    """we came for my sister's birthday | this was our second visit | it was a Tuesday night | we had booked for seven
    | my wife and I stopped by after the theatre | I was in town for a conference
    | we found a table without a reservation
    | the bill came to about what I had expected | a colleague had picked the place
    | it is a short walk from the station
    | four of us went on Saturday | I had walked past it for years"""
)
CONTRAST = _items(
    """{a}, but {b} | although {a}, {b} | {a}, though {b} | while {a}, {b} | {a}. However, {b} | {a}; still, {b}
    | it is true that {a}, but {b}"""
)
AGREEMENT = _items("{a}, and {b} | {a} and, what is more, {b} | {a}; also, {b} | {a}, and on top of that {b}")
