"""The stored reference: what is computed, what is found again, and what a key is made of."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from unidpo.cache.keys import UNREADABLE, content_keys, weights_fingerprint
from unidpo.cache.reference import LogpStore, ReferencePass
from unidpo.cache.store import default_cache, numbers_folder
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response
from unidpo.model.attention import PACK_ATTENTION, set_text_attention
from unidpo.model.load import load_config, load_policy
from unidpo.model.logps import response_logps
from unidpo.model.packs import pack, pad
from unidpo.model.policy import Policy
from worlds import GOLDEN, group, tiny_policy


@pytest.fixture(scope="module")
def policy():
    """The golden model with pack attention, and its encoder."""
    model, _, encoder = tiny_policy()
    set_text_attention(model, PACK_ATTENTION)
    return model, encoder


@pytest.fixture
def forwards(policy):
    """Grows by one for each forward pass of the language model."""
    calls = []
    hook = policy[0].model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


@pytest.fixture(scope="module")
def groups():
    return [group(images=i % 2, responses=(2, 3), seed=i, row=i + 1) for i in range(10)]


def keys_of(groups):
    keys = content_keys(groups)
    assert keys.lost == []
    return keys.responses


def lookup(store, keys):
    return [store.lookup(of_group) for of_group in keys]


def fill(policy, store, groups, *, collate=pack, keys=None, **options):
    """Compute what is missing; returns how many that were."""
    model, encoder = policy
    before = len(store)
    reference_pass = ReferencePass(Policy(model, model), encoder, torch.device("cpu"), collate=collate, **options)
    reference_pass.fill(store, reference_pass.tasks(groups, keys or keys_of(groups), store))
    return len(store) - before


@pytest.fixture
def filled(policy, groups, tmp_path):
    store = LogpStore(tmp_path / "store")
    assert fill(policy, store, groups) == 20
    return store


def test_a_second_pass_finds_everything_and_runs_nothing(policy, groups, filled, forwards):
    again = LogpStore(filled.folder)
    assert fill(policy, again, groups) == 0
    assert forwards == []
    assert all(
        torch.equal(a, b) for a, b in zip(lookup(again, keys_of(groups)), lookup(filled, keys_of(groups)), strict=True)
    )


def test_only_new_rows_are_computed(policy, groups, filled):
    new = group(images=1, responses=(4, 2), seed=99, row=11)
    said = []
    assert fill(policy, LogpStore(filled.folder), [*groups, new], on_progress=lambda *done: said.append(done)) == 2
    assert said == [(0, 2), (2, 2)]


def test_a_new_response_to_a_known_prompt_is_computed_alone(policy, groups, filled):
    longer = replace(groups[1], responses=(*groups[1].responses, Response("quite another answer", 1.0)))
    store = LogpStore(filled.folder)
    assert fill(policy, store, [longer]) == 1
    model, encoder = policy
    with torch.no_grad():
        live = response_logps(model, pack([encoder.encode(longer)]))
    torch.testing.assert_close(lookup(store, keys_of([longer]))[0].float(), live, rtol=0, atol=1e-5)


def test_an_interrupted_pass_keeps_what_it_had_and_goes_on(policy, groups, tmp_path, monkeypatch, forwards):
    monkeypatch.setattr(ReferencePass, "batch_tokens", 1)  # a forward pass per group

    def interrupt(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(policy, LogpStore(tmp_path), groups, on_progress=interrupt)
    assert len(forwards) == 4
    assert len(LogpStore(tmp_path)) == 8
    assert fill(policy, LogpStore(tmp_path), groups) == 12
    assert len(forwards) == 10


def test_an_interrupted_pass_leaves_the_model_in_its_mode(policy, groups, tmp_path):
    def interrupt(done, total):
        if done:
            assert not policy[0].training
            raise KeyboardInterrupt

    policy[0].train()
    try:
        with pytest.raises(KeyboardInterrupt):
            fill(policy, LogpStore(tmp_path), groups, on_progress=interrupt)
        assert policy[0].training
    finally:
        policy[0].eval()


def test_long_passes_reach_the_disk_as_they_go(policy, groups, tmp_path, monkeypatch):
    monkeypatch.setattr(ReferencePass, "batch_tokens", 1)
    monkeypatch.setattr("unidpo.cache.store.FLUSH_SECONDS", -1.0)
    on_disk = []
    fill(policy, LogpStore(tmp_path), groups[:3], on_progress=lambda *_: on_disk.append(len(LogpStore(tmp_path))))
    assert on_disk == [0, 0, 2, 4]


@pytest.mark.parametrize("batch_tokens", [1, 150, 8192])
def test_stored_equals_live(policy, groups, tmp_path, monkeypatch, batch_tokens):
    monkeypatch.setattr(ReferencePass, "batch_tokens", batch_tokens)
    model, encoder = policy
    store = LogpStore(tmp_path)
    fill(policy, store, groups)
    for one, stored in zip(groups, lookup(LogpStore(tmp_path), keys_of(groups)), strict=True):
        with torch.no_grad():
            batch = pack([encoder.encode(one)])
            live = response_logps(model, batch) / batch.response_tokens
        torch.testing.assert_close((stored / batch.response_tokens).float(), live, rtol=0, atol=1e-6)


def test_the_padded_path_stores_the_same_numbers(groups, filled, tmp_path):
    model, _, encoder = tiny_policy()
    keys = keys_of(groups)
    store = LogpStore(tmp_path / "padded")
    fill((model, encoder), store, groups, collate=lambda g: pad(g, pad_token_id=0))
    for ours, theirs in zip(lookup(store, keys), lookup(filled, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_a_response_that_stands_twice_is_computed_once(policy, tmp_path, caplog):
    one = group(responses=(2, 3), seed=5)
    two = replace(one, responses=(one.responses[0], replace(one.responses[1], score=1.5)), pairs=(Pair(0, 1, 2),))
    with caplog.at_level("INFO", "unidpo"):
        fill(policy, LogpStore(tmp_path), [one, two])
    assert "0 responses found" in caplog.text, "nothing was stored before"
    assert "2 to compute" in caplog.text


def test_nothing_new_writes_no_part(policy, groups, filled):
    parts = sorted(filled.folder.iterdir())
    fill(policy, LogpStore(filled.folder), groups)
    assert sorted(filled.folder.iterdir()) == parts


def test_two_writers_do_not_lose_each_others_numbers(policy, groups, tmp_path):
    first, second = LogpStore(tmp_path), LogpStore(tmp_path)
    fill(policy, first, groups[:2])
    fill(policy, second, groups[2:4])
    assert fill(policy, LogpStore(tmp_path), groups[:4]) == 0


def test_a_part_that_was_never_finished_is_ignored(policy, groups, filled):
    (filled.folder / ".0123456789abcdef.unfinished").write_bytes(b"PAR1 half a part")
    assert len(LogpStore(filled.folder)) == 20


def test_a_group_that_is_lost_has_no_numbers(groups, filled):
    known, other = keys_of(groups)[:2]
    first, second, unreadable = lookup(filled, [known, [other[0], b"0" * 16], [UNREADABLE] * 2])
    assert first.isfinite().all()
    assert second is None
    assert unreadable is None


def test_a_dummy_group_changes_no_number_and_has_none(policy, groups, filled, tmp_path):
    store = LogpStore(tmp_path / "joined")
    dummy_group = policy[1].encode(group(images=1, responses=(1, 1, 1), seed=77))
    text = groups[0::2]
    assert not any(one.images for one in text)
    assert fill(policy, store, text, dummy_group=dummy_group) == 10
    assert len(store) == 10
    for ours, theirs in zip(lookup(store, keys_of(text)), lookup(filled, keys_of(text)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_a_shared_store_holds_what_is_asked_for(groups, filled):
    keys = keys_of(groups[2:5])
    store = LogpStore.shared(filled.folder, [*keys[0], *keys[1], *keys[2], b"0" * 16, UNREADABLE])
    assert len(store) == 6
    assert all(torch.equal(a, b) for a, b in zip(lookup(store, keys), lookup(filled, keys), strict=True))


def test_a_row_that_goes_bad_before_its_turn_is_told_and_the_others_are_computed(policy, tmp_path):
    groups = [group(images=1, seed=i, row=i + 1) for i in range(3)]
    groups[1].images[0].save(path := tmp_path / "here.png")
    groups[1] = replace(groups[1], images=(path,))
    keys, told = keys_of(groups), []
    path.unlink()
    model, encoder = policy
    reference_pass = ReferencePass(
        Policy(model, model), encoder, torch.device("cpu"), on_lost=told.append, collate=pack
    )
    logps = reference_pass.logps(groups, keys, tmp_path / "store")
    ((lost,),) = told
    assert lost.row == 2
    assert "here.png" in lost.message
    assert [each is None for each in logps] == [False, True, False]


# --- keys -------------------------------------------------------------------------------------------------------------


def ask(*messages, images=(), answers=("yes", "no")):
    responses = tuple(Response(text, float(i)) for i, text in enumerate(answers))
    return PromptGroup(messages, tuple(images), responses, (Pair(1, 0, 1),))


def key(*args, **options):
    return keys_of([ask(*args, **options)])[0][0]


def test_keys_change_with_what_the_number_depends_on(tmp_path):
    red, blue = Image.new("RGB", (60, 60), "red"), Image.new("RGB", (60, 60), "blue")
    asks, user = (Message("user", ("What?",)),), Message("user", ("What?",))
    keys = {
        "plain": key(*asks),
        "prompt": key(Message("user", ("What??",))),
        "response": key(*asks, answers=("yes.", "no")),
        "role": key(Message("system", ("What?",)), user),
        "other role": key(Message("assistant", ("What?",)), user),
        "one message": key(Message("user", ("What?What?",))),
        "image": key(Message("user", (IMAGE, "What?")), images=[red]),
        "other image": key(Message("user", (IMAGE, "What?")), images=[blue]),
        "image behind": key(Message("user", ("What?", IMAGE)), images=[red]),
        "mark as text": key(Message("user", ("<image>What?",))),
        "two images": key(Message("user", (IMAGE, IMAGE, "What?")), images=[red, blue]),
        "swapped": key(Message("user", (IMAGE, IMAGE, "What?")), images=[blue, red]),
    }
    assert len(set(keys.values())) == len(keys)
    assert {len(each) for each in keys.values()} == {16}


def test_what_is_hashed_cannot_pass_for_something_else():
    """Each of these pairs is one sequence of strings, read two ways."""
    user = Message("user", ("q",))
    image = Image.new("RGB", (60, 60))
    assert key(Message("user", ("x", IMAGE, "assistant")), user, images=[image]) != key(
        Message("user", ("x", IMAGE)), Message("assistant", ()), user, images=[image]
    )
    assert key(Message("user", ("x", "\0image"))) != key(Message("user", ("x", IMAGE)), images=[image])
    assert key(Message("user", ("x", "\0response", "y")), answers=("z", "no")) != key(
        Message("user", ("x",)), answers=("y\0responsez", "no")
    )


def test_keys_do_not_depend_on_scores_rows_or_the_order_of_groups():
    groups = [group(images=i % 2, responses=(2, 3), seed=i) for i in range(4)]
    rescored = [replace(g, responses=tuple(replace(r, score=9.0) for r in g.responses)) for g in groups]
    assert keys_of(groups) == keys_of(rescored)
    assert keys_of(groups[::-1]) == keys_of(groups)[::-1]


def test_equal_responses_of_one_group_have_one_key():
    (keys,) = keys_of([ask(Message("user", ("q",)), answers=("same", "same"))])
    assert keys[0] == keys[1]


def test_a_file_is_known_by_its_content(tmp_path):
    for name, color in {"a": "red", "copy": "red", "b": "blue"}.items():
        Image.new("RGB", (60, 60), color).save(tmp_path / f"{name}.png")
    a, copy, b = (key(Message("user", (IMAGE,)), images=[tmp_path / f"{name}.png"]) for name in ("a", "copy", "b"))
    assert a == copy != b


def test_a_prompt_whose_image_is_gone_has_no_keys_and_its_rows_are_named(tmp_path):
    whole, gone = (group(images=2, responses=(2, 3), seed=seed, row=seed) for seed in (1, 2))
    pairs = (Pair(0, 1, 2, tmp_path / "pairs.json"), Pair(1, 0, 3, tmp_path / "pairs.json"))
    gone = replace(gone, images=(gone.images[0], tmp_path / "gone.png"), pairs=pairs)
    keys = content_keys([gone, whole, gone])
    assert keys.responses == [[UNREADABLE] * 2, *keys_of([whole]), [UNREADABLE] * 2]
    assert [finding.row for finding in keys.lost] == [2, 3] * 2
    assert all("gone.png" in finding.message and finding.file == tmp_path / "pairs.json" for finding in keys.lost)


# --- where the numbers belong ----------------------------------------------------------------------------------------


def test_the_weights_fingerprint_sees_one_changed_weight_and_knows_a_reloaded_model():
    model = load_policy(GOLDEN / "model")
    before = weights_fingerprint(model)
    assert weights_fingerprint(load_policy(GOLDEN / "model")) == before
    assert weights_fingerprint(load_policy(GOLDEN / "model", dtype=torch.bfloat16)) != before
    with torch.no_grad():
        model.model.visual.merger.mlp[0].bias[3] += 1e-6
    assert weights_fingerprint(model) != before


def test_the_weights_fingerprint_sees_other_rotary_frequencies():
    """A setting of the configuration, of which no saved weight knows."""
    model, settings = load_policy(GOLDEN / "model"), load_config(GOLDEN / "model")
    settings.get_text_config().rope_parameters["rope_theta"] *= 10
    other = type(model)(settings)
    other.load_state_dict(model.state_dict())
    assert weights_fingerprint(other) != weights_fingerprint(model)


def test_the_attention_in_use_is_no_part_of_the_weights(policy):
    assert weights_fingerprint(policy[0]) == weights_fingerprint(load_policy(GOLDEN / "model"))


def test_the_folder_depends_on_model_encoder_and_compute_dtype(policy, tmp_path):
    encoder = policy[1]
    other = tiny_policy()[2]
    other.max_length = 99
    cases = [
        ("aa", encoder, torch.float32),
        ("ab", encoder, torch.float32),
        ("aa", encoder, torch.bfloat16),
        ("aa", other, torch.float32),
    ]
    folders = {numbers_folder(tmp_path, "reference", name, how, compute_dtype=kind) for name, how, kind in cases}
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "reference"}


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIDPO_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("UNIDPO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "unidpo"
