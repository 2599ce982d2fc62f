"""Students: the models that are trained on a teacher's text, and the loop that trains them."""
