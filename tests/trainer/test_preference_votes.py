"""Votes of the preference study become the paper's score, with intervals and agreement; what is no vote is
one sentence.
"""

import json
from functools import partial

import commands
import numpy as np
import pytest
from scipy.stats import binom
from two_models import ballot, folders, one_sentence, picture, same

from apt_core.errors import AptError
from trainer.preference.page import arrange, make_page
from trainer.preference.statistics import alpha, bootstrap, score
from trainer.preference.votes import count_votes, show_votes

N = np.nan


@pytest.fixture
def study(tmp_path):
    a, b = folders(tmp_path)
    return make_page(a, b, tmp_path / "page.html", seed=3)


def test_scores_are_the_papers(study, tmp_path):
    """Over 4 pairs and 3 raters: fidelity 7 good, 3 same, 2 bad; the others all one way."""
    for rater, fidelity in (("Ann", "AAAS"), ("Ben", "AASB"), ("Cy", "AASB")):
        ballot(
            study,
            tmp_path / f"{rater}.json",
            rater,
            {"fidelity": fidelity, "structure": "BBBB", "text": "SSSS"},
        )
    count = count_votes([tmp_path / f"{rater}.json" for rater in ("Ann", "Ben", "Cy")])
    fidelity, structure, text = count.scores.values()
    assert (fidelity.good, fidelity.same, fidelity.bad) == (7, 3, 2) and fidelity.score == pytest.approx(
        5 / 12
    )
    assert -0.5 < fidelity.low < fidelity.score < fidelity.high <= 1 and fidelity.agreement > 0.4
    assert (structure.score, structure.low, structure.high, structure.agreement) == (-1, -1, -1, None)
    assert (text.good, text.same, text.bad, text.score) == (0, 12, 0, 0)
    assert (
        count.json()["raters"] == ["Ann", "Ben", "Cy"] and count.json()["questions"]["fidelity"]["good"] == 7
    )


def test_sides_change_nothing(tmp_path):
    """The same opinions under other orders and sides, and with A and B in each other's place."""
    a, b = folders(tmp_path, 7)
    for seed in range(4):
        made = make_page(a, b, tmp_path / f"{seed}.html", seed)
        vote = ballot(made, tmp_path / f"votes{seed}.json", "Ann", same("AABSAAA"))
        one = count_votes([vote], tmp_path / f"{seed}.key.json").scores["text"]
        assert (one.good, one.same, one.bad) == (5, 1, 1)


def test_the_interval_is_the_binomials():
    """One vote a pair, none the same: the number of good ones among n drawn again is binomial."""
    n, good = 200, 140
    values = np.where(np.arange(n) < good, 1.0, -1.0)[None]
    low, high = bootstrap(values)
    exact = [2 * binom.ppf(q, n, good / n) / n - 1 for q in (0.025, 0.975)]
    assert (low, high) == pytest.approx(exact, abs=2 / n)  # one vote more or less


def test_the_interval_follows_pairs_not_votes():
    """Three raters who agree on everything are no more than one."""
    values = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], (1, 60))
    assert bootstrap(np.repeat(values, 3, 0)) == pytest.approx(bootstrap(values), abs=1e-12)
    deviation = values.std() / np.sqrt(60)
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.05)


def test_of_one_pair_there_is_no_interval():
    one = score(np.array([[1.0], [1.0]]))
    assert (one.score, one.low, one.high, one.agreement) == (1, None, None, None)
    nothing = score(np.full((2, 3), N))
    assert (nothing.good, nothing.score, nothing.low, nothing.agreement) == (0, None, None, None)


# Krippendorff's example of four observers and twelve units (Computing Krippendorff's Alpha-Reliability).
EXAMPLE = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
        [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
    ]
)


@pytest.mark.parametrize("metric, published", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_agreement_is_the_published_one(metric, published):
    assert alpha(EXAMPLE, metric) == pytest.approx(published, abs=5e-4)


def test_agreement_of_votes():
    """1 for the same votes, near 0 for votes by chance, below 0 for opposite ones, None for one rater."""
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (3, 400))
    assert alpha(np.repeat(values[:1], 3, 0)) == 1
    assert abs(alpha(values)) < 0.1
    assert alpha(np.stack([values[0], -values[0]])) < -0.4
    assert alpha(values[:1]) is None


def test_the_key_is_found_beside_the_votes_and_among_them(study, tmp_path, monkeypatch):
    vote = ballot(study, tmp_path / "votes.json", "Ann", same("AAAA"))
    assert count_votes([vote]).scores["text"].score == 1
    (tmp_path / "other.key.json").write_text("{}")  # a file that happens to be called so
    assert count_votes([vote]).key.study == study.id
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "in" / "votes.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(vote.read_text())
    assert count_votes([elsewhere]).key.study == study.id
    (tmp_path / "page.key.json").rename(tmp_path / "in" / "key.json")
    with pytest.raises(AptError) as error:
        count_votes([vote])
    one_sentence(error, f"no key of the study {study.id} lies beside", "--key page.key.json")
    assert count_votes([vote, tmp_path / "in" / "key.json"]).scores["text"].score == 1
    assert count_votes([vote], tmp_path / "in" / "key.json").scores["text"].score == 1


def test_unfinished_votes_are_counted_when_asked(study, tmp_path):
    vote = ballot(study, tmp_path / "votes.json", "Ann", same("AA--") | {"text": "AB-S"})
    with pytest.raises(AptError) as error:
        count_votes([vote])
    one_sentence(error, "votes.json is not finished, 2 of 4 pairs lack an answer", "--unfinished")
    scores = count_votes([vote], unfinished=True).scores
    assert (scores["fidelity"].good, scores["fidelity"].same, scores["fidelity"].bad) == (2, 0, 0)
    assert (scores["text"].good, scores["text"].same, scores["text"].bad) == (1, 1, 1)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"study": "0123"}, ("holds votes on another page (study 0123, the key's is",)),
        ({"kind": "something"}, ("holds no votes: give the files that the raters saved",)),
        ({"format": 2}, ("has format 2, but only 1 can be read",)),
        ({"rater": " "}, ("is damaged: have the rater open the page and save the votes again",)),
        ({"rater": None}, ("is damaged",)),
        ({"votes": {}}, ("is damaged",)),
        ({"votes": [None]}, ("is damaged",)),
        ({"votes": [{"pair": []}]}, ("is damaged",)),
        ({"votes": [{"pair": "0"}]}, ("is damaged",)),
        ({"votes": "twice"}, ("is damaged",)),
        ({"votes": "answer"}, ("is damaged",)),
        ({"votes": []}, ("has no answer in it",)),
        ({"study": 5}, ("is damaged",)),
    ],
)
def test_votes_that_are_none_are_one_sentence(changes, parts, study, tmp_path):
    good = {"fidelity": "left", "structure": "left", "text": "left"}
    if changes.get("votes") == "twice":
        changes = {"votes": [{"pair": study.mark(0)} | good] * 2}
    if changes.get("votes") == "answer":
        changes = {"votes": [{"pair": study.mark(0)} | good | {"text": ["left"]}]}
    vote = ballot(study, tmp_path / "votes.json", "Ann", same("AAAA"), changes)
    for unfinished in (False, True):
        with pytest.raises(AptError) as error:
            count_votes([vote], unfinished=unfinished)
        one_sentence(error, "votes.json", *parts)


def test_damaged_files_are_one_sentence(study, tmp_path):
    vote = ballot(study, tmp_path / "votes.json", "Ann", same("AAAA"))
    (tmp_path / "cut.json").write_text(vote.read_text()[:50])
    with pytest.raises(AptError) as error:
        count_votes([vote, tmp_path / "cut.json"])
    one_sentence(error, "cut.json is damaged")
    key = json.loads((tmp_path / "page.key.json").read_text())
    damaged = [
        key | {"pairs": []},
        key | {"pairs": [{"pair": "x", "left": "c"}]},
        key | {"pairs": key["pairs"][:1] * 2},
        key | {"a": 1},
    ]
    for content in damaged:
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(AptError) as error:
            count_votes([vote], tmp_path / "bad.json")
        one_sentence(error, "bad.json is damaged")
    with pytest.raises(AptError) as error:
        count_votes([vote], vote)
    one_sentence(error, "votes.json is no key of a preference study")
    with pytest.raises(AptError) as error:
        count_votes([tmp_path / "page.key.json"])
    one_sentence(error, "there are no votes to count")


def test_one_rater_counts_once(study, tmp_path):
    votes = [
        ballot(study, tmp_path / f"{n}.json", name, same("AAAA"))
        for n, name in enumerate(("Ann  Lee", "ann lee "))
    ]
    with pytest.raises(AptError) as error:
        count_votes(votes)
    one_sentence(error, "0.json and ", "1.json are both of the rater 'ann lee'")
    assert count_votes([votes[0], votes[0]]).raters == ["Ann  Lee"]


def test_figures_do_not_take_the_place_of_votes(study, tmp_path):
    vote = ballot(study, tmp_path / "votes.json", "Ann", same("AAAA"))
    before = vote.read_text()
    with pytest.raises(AptError) as error:
        show_votes([vote], out=tmp_path / "votes.json")
    one_sentence(error, "is one of the files of votes")
    assert vote.read_text() == before


# The command line.


command = partial(commands.command, "preference")


def test_the_command_makes_a_page_and_counts(tmp_path):
    a, b = folders(tmp_path)
    picture(a / "alone.png", 3, "alone", 0, 0)
    made = command(a, b, "--out", tmp_path / "page.html", "--seed", 3)
    assert made.exit_code == 0, made.output
    assert (
        "1 sample of " in made.output
        and "alone.png" in made.output
        and "page.html: 4 pairs, for the raters." in made.output
    )
    study = arrange(a, b, 3)[0]
    votes = [
        ballot(
            study,
            tmp_path / f"{n}.json",
            f"rater {n}",
            {"fidelity": "AAAS", "structure": "SBBB", "text": "ABSS"},
        )
        for n in range(3)
    ]
    done = command("--votes", *votes, tmp_path / "page.key.json", "--out", tmp_path / "scores.json")
    assert done.exit_code == 0, done.output
    rows = {line.split("  ")[0]: line.split() for line in done.output.splitlines()}
    assert rows["Visual fidelity"][2] == "+75.0%" and rows["Visual fidelity"][-4:] == ["9", "3", "0", "1.00"]
    assert rows["Structural integrity"][2] == "-75.0%" and rows["Text alignment"][2] == "+0.0%"
    assert "4 pairs, 3 raters." in done.output
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert (
        kept["study"] == study.id
        and kept["questions"]["structure"]
        == json.loads(json.dumps(count_votes(votes).json()))["questions"]["structure"]
    )
    assert kept["questions"]["structure"]["score"] == -0.75 and kept["bootstrap"]["seed"] == 0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("a",), "1 path was given: a page needs two folders of samples"),
        (("a", "b", "c"), "3 paths were given"),
        (("a", "b", "--key", "k"), "--key is for counting votes"),
        (("a", "b", "--unfinished"), "--unfinished is for counting votes"),
        (("--votes", "a.json", "--link"), "--link is for making a page"),
        (("--votes", "a.json"), "a.json does not exist: have the rater"),
    ],
)
def test_options_of_the_other_kind_are_refused(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command(*arguments)
    assert result.exit_code == 2 and sentence in result.output
