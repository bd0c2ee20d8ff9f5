"""Arrays and meshes: parameter trees, masks, exact selection, sharding. Array maths alone."""
