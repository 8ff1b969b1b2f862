"""The paper's user study (section 4.2): people compare two models' samples pair by pair, without knowing
which is whose."""

QUESTIONS = {
    "fidelity": ("Visual fidelity", "Which is sharper and cleaner, with better colours and details?"),
    "structure": ("Structural integrity", "Which has fewer broken or impossible shapes and movements?"),
    "text": ("Text alignment", "Which shows better what the text says?"),
}
"""Title and wording of each question, by the name that votes have it under."""
SIDES = ("left", "right")
ANSWERS = ("left", "same", "right")
FORMAT = 1
KEY, VOTES = "apt-preference-key", "apt-preference-votes"
"""What a file says that it is."""
