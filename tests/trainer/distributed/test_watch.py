"""Held-out samples are never trained on, and the watch over the discriminator says what it would find."""

import pytest
import torch
from layouts import SHAPE, Text, write_shards

from apt_core.method.flow import sample_noise
from trainer.data.batches import Batches
from trainer.machines.distributed import World
from trainer.run.monitor import ChanceWarning, FloorWarning, MotionWarning
from trainer.stages.watch import Measure, Watch


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, samples=40)
    return folder


def test_no_update_sees_a_held_out_sample_and_the_rest_are_all_seen(shards):
    batches = Batches(shards, Text(), seed=0, held_out=3)
    held = {batches.datasets["video"].samples[i].id for i in batches.held["video"]}
    seen = set()
    for update in range(40):
        for micro in batches.take("video", "d", update, 4, World()):
            seen |= set(micro.names)
    assert len(held) == 3 and not held & seen and len(seen) == 37


def test_what_is_held_out_depends_on_names_alone_and_is_part_of_the_data(shards):
    one, other, none = (
        Batches(shards, Text(), seed=seed, held_out=n) for seed, n in ((0, 3), (9, 3), (0, 0))
    )
    assert one.held == other.held and one.fingerprint == other.fingerprint != none.fingerprint
    assert none.held == {"image": [], "video": []}
    # a tenth, however much is asked for
    assert len(Batches(shards, Text(), seed=0, held_out=1000).held["image"]) == 4


def by_mean(x, t, text):
    """A discriminator that takes whatever is darker than 0 for real."""
    return -x.flatten(1).mean(1)


def test_the_verdict_on_held_out_and_fresh_samples(shards):
    data = Batches(shards, Text(), seed=0, held_out=4)
    held = data.held["video"]
    watch = Watch(data.datasets["video"], held, every=5, at_once=3, seed=7, shift=1.0, world=World())
    assert [watch.due(update) for update in (4, 5, 6, 10)] == [False, True, False, True]

    def generator(hidden_states, **_):
        return [torch.ones_like(hidden_states)]  # its samples are z - 1

    found = watch(5, generator, by_mean)
    real = torch.stack([by_mean(data.datasets["video"].batch([i])[0], None, None)[0] for i in held])
    fake = torch.stack(
        [by_mean(sample_noise([5 * 4 + k], SHAPE, 7, "watch/z") - 1, None, None)[0] for k in range(4)]
    )
    assert found == {
        "held_right_real": pytest.approx((real > 0).float().mean().item()),
        "held_right_fake": pytest.approx((fake < 0).float().mean().item()),
        "held_right_pairs": pytest.approx((real > fake).float().mean().item()),
        "held_gap": pytest.approx((real.mean() - fake.mean()).item(), abs=1e-6),
    }
    assert found["held_right_fake"] == 0 and watch(10, generator, by_mean)["held_gap"] != found["held_gap"]


def brightest(x):
    """A figure that each sample has by itself."""
    return x.flatten(1).amax(1)


class Scaled:
    """A generator whose samples are its noise times a number."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, hidden_states, **_):
        return [(1 - self.scale) * hidden_states]


def test_fakes_are_measured_beside_real_samples_and_the_start(shards):
    data = Batches(shards, Text(), seed=0, held_out=4)
    held, calls = data.held["video"], []

    def few(x):
        calls.append(len(x))
        return brightest(x)

    none = Measure(lambda x: torch.zeros(len(x)))  # as motion is of images
    measures = {"all": Measure(brightest), "few": Measure(few, samples=1, every=2), "none": none}
    watch = Watch(
        data.datasets["video"], held, every=5, at_once=3, seed=7, shift=1.0, world=World(), measures=measures
    )
    watch.begin(Scaled(2.0))
    real = torch.stack([brightest(data.datasets["video"].batch([i])[0])[0] for i in held])
    z = {
        update: sample_noise(range(update * 4, update * 4 + 4), SHAPE, 7, "watch/z") for update in (0, 5, 10)
    }
    found, later = watch(5, Scaled(0.5), by_mean), watch(10, Scaled(0.5), by_mean)
    assert "few_of_real" not in found and not any(name.startswith("none") for name in found | later)
    assert found["all_of_real"] == pytest.approx(float(0.5 * brightest(z[5]).mean() / real.mean()))
    assert found["all_of_start"] == pytest.approx(
        float(0.25 * brightest(z[5]).mean() / brightest(z[0]).mean())
    )
    assert later["few_of_real"] == pytest.approx(float(0.5 * brightest(z[10])[0] / real[0]))
    assert calls == [1, 1, 1]  # real, start, and one look of two


def test_clips_that_stop_moving_are_named_with_what_took_it():
    warning, rows = (
        MotionWarning(),
        [(1.0, 1.0), (0.72, 0.9), (0.6, 0.65), (0.5, 0.5), (0.9, 0.95), (0.6, 0.66)],
    )
    said = [warning.see(10 * n, {"motion_of_real": a, "motion_of_start": b}) for n, (a, b) in enumerate(rows)]
    assert [message is not None for message in said] == [False, False, True, False, False, True]
    assert said[2].startswith(
        "update 20: clips of one step have 60% of the motion of real ones, "
        "and 65% of what they had before this "
        "phase: keep the best state"
    )
    assert MotionWarning().see(10, {"motion_of_real": 0.8, "motion_of_start": 0.6})
    start = MotionWarning().see(10, {"motion_of_real": 0.5, "motion_of_start": 1.0})
    assert (
        "50% of the motion of real ones, and had 50% before this phase: start the video phase from weights"
        in start
    )
    assert (
        MotionWarning()
        .see(50, {"judged_motion": 0.4})
        .startswith("update 50: clips of one step have 40% of the motion of real ones: start")
    )
    assert MotionWarning().see(10, {"d_loss": 1.0}) is None


ROW = {"logit_real": 0.02, "logit_fake": 0.01, "right_pairs": 0.5, "r1_gamma": 9.0}


def test_a_discriminator_at_chance_is_named_after_fifty_updates():
    warning = ChanceWarning()
    said = [done for done in range(1, 201) if warning.see(done, ROW)]
    assert said == [50, 100, 150, 200]
    message = ChanceWarning().see(50, ROW)
    assert (
        "at chance since update 1 (it is right on 50% of pairs, logits 0.01 apart; lambda sigma^2 is 9,"
        in message
        and "r1_sigma" in message
    )
    both = ChanceWarning().see(50, ROW | {"r1_gamma_time": 0.25})
    assert "lambda sigma^2 is 9 and in time 0.25, the paper's" in both
    assert ChanceWarning().see(50, {"cd_loss_image": 1.0}) is None


def test_held_out_samples_have_the_last_word():
    learned_by_heart, sound = ChanceWarning(), ChanceWarning()
    said = [
        learned_by_heart.see(done, {**ROW, "right_pairs": 0.99, "held_right_pairs": 0.5})
        for done in range(1, 60)
    ]
    assert sum(map(bool, said)) == 1
    assert not any(sound.see(done, {**ROW, "held_right_pairs": 0.7}) for done in range(1, 200))


def test_rounding_that_is_a_large_part_of_the_penalty_is_named():
    assert "50% of the penalty is rounding" in FloorWarning().see(1, {"r1": 2e-4, "r1_floor": 1e-4})
    assert (
        FloorWarning().see(1, {"r1": 2e-4, "r1_floor": 1e-6}) is None
        and FloorWarning().see(2, {"r1": 2e-4}) is None
    )
