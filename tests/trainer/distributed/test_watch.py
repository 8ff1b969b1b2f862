"""Held-out samples are never trained on, and the watch over the discriminator says what it would find."""

import pytest
import torch
from layouts import SHAPE, Text, write_shards

from apt_core.method.flow import sample_noise
from trainer.data.batches import Batches
from trainer.machines.distributed import World
from trainer.run.monitor import ChanceWarning, FloorWarning
from trainer.stages.watch import Watch


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
