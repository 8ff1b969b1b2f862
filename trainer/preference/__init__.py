"""The paper's user study (section 4.2): people compare two models' samples pair by pair, without knowing
which model made which."""

QUESTIONS = {
    "fidelity": ("Visual fidelity", "Which is sharper and cleaner, with better colours and details?"),
    "structure": ("Structural integrity", "Which has fewer broken or impossible shapes and movements?"),
    "text": ("Text alignment", "Which shows better what the text says?"),
}
"""Title and wording of each question, by its name in the files of votes."""
SIDES = ("left", "right")
ANSWERS = ("left", "same", "right")
FORMAT = 1
KEY, VOTES = "apt-preference-key", "apt-preference-votes"
"""The value of "kind" in the study's files."""
