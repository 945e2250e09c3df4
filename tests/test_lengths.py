"""Groups in tokens: the counts of `TokenCounter`, and what the length limit leaves."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trainers import some_groups, trainer_of
from unidpo.data.pairs import IMAGE, GroupTokens, Message, Pair, PromptGroup, Response, ranked_pairs
from unidpo.errors import DataError, ImageError, ModelError
from unidpo.model.encode import Encoder, PromptTooLong, plain_positions
from unidpo.model.lengths import TokenCounter, fit_to_length
from unidpo.model.load import load_processor
from worlds import GOLDEN, group, picture


@pytest.fixture(scope="module")
def processor():
    return load_processor(GOLDEN / "model")


@pytest.fixture(scope="module")
def make(processor):
    """An encoder of the golden model, with options."""
    return lambda **options: Encoder(processor, plain_positions, **options)


def ask(*content, images=(), answers=("yes", "no")):
    return PromptGroup(
        (Message("user", content),), tuple(images), tuple(Response(text) for text in answers), (Pair(0, 1, 7),)
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), max_size=3),
    max_pixels=st.sampled_from([1024, 5000, 768 * 768]),
    words=st.integers(0, 5),
)
def test_prompts_are_counted_as_encode_makes_them(make, sizes, max_pixels, words):
    # The model's processor refuses shapes beyond 200:1.
    sizes = [(max(w, h // 50), max(h, w // 50)) for w, h in sizes]
    one = ask(*[IMAGE] * len(sizes), "word " * words, images=[Image.new("RGB", size) for size in sizes])
    encoder = make(max_pixels=max_pixels)
    counter = TokenCounter(encoder)
    assert counter.one(one).prompt == len(encoder.encode(one).prompt_ids)
    # A second prompt with images of the same sizes is counted from memory.
    other = ask("other text here", *[IMAGE] * len(sizes), images=[Image.new("RGB", size) for size in sizes])
    assert counter.one(other).prompt == len(encoder.encode(other).prompt_ids)


def test_a_processors_own_count_of_patches_is_believed_only_once_it_was_right():
    """Of images that a processor tiles, for one, it counts otherwise."""
    processor = load_processor(GOLDEN / "model")
    encoder = Encoder(processor, plain_positions)
    counter = TokenCounter(encoder)
    counted = processor.image_processor.get_number_of_image_patches
    processor.image_processor.get_number_of_image_patches = lambda *size: counted(*size) + 4 * 9
    for side in (56, 84):
        one = ask(IMAGE, images=[Image.new("RGB", (side, side))])
        assert counter.one(one).prompt == len(encoder.encode(one).prompt_ids)


def test_counting_reads_no_pixels(make, tmp_path):
    path = tmp_path / "half.png"
    Image.effect_noise((112, 84), 50).save(path)
    whole = TokenCounter(make()).one(ask(IMAGE, images=[path])).prompt
    path.write_bytes(path.read_bytes()[:2000])
    assert TokenCounter(make()).one(ask(IMAGE, images=[path])).prompt == whole


def test_a_shape_the_models_processor_refuses(make):
    one = ask(IMAGE, images=[Image.new("RGB", (1, 300))])
    with pytest.raises(DataError, match=r"row 7: .*aspect ratio"):
        fit_to_length([one], make())


def test_fewer_pixels_are_fewer_tokens(make):
    one = ask(IMAGE, images=[Image.new("RGB", (280, 280))])
    counts = [TokenCounter(make(max_pixels=cap)).one(one).prompt for cap in (280 * 280, 140 * 140, 56 * 56)]
    plain = TokenCounter(make()).one(ask("")).prompt + 2  # vision start and end
    assert [count - plain for count in counts] == [100, 25, 4]


def test_length_findings_name_row_length_and_limit(make):
    one = group(images=1, responses=(2, 30), row=12)
    encoded = make().encode(one)
    prompt, longer = len(encoded.prompt_ids), len(encoded.response_ids[1])
    assert TokenCounter(make()).findings(one) == []
    assert TokenCounter(make(max_length=prompt + longer)).findings(one) == []
    (cut,) = TokenCounter(make(max_length=prompt + longer - 3)).findings(one)
    assert (cut.kind, cut.row, cut.severity) == ("response-cut", 12, "warning")
    assert f"{prompt + longer} tokens" in cut.message
    assert "its last 3" in cut.message
    (long,) = TokenCounter(make(max_length=prompt)).findings(one)
    assert (long.kind, long.row) == ("prompt-too-long", 12)
    assert f"{prompt} tokens" in long.message
    assert f"data.max_length is {prompt}" in long.message


def test_prompts_that_do_not_fit_are_left_out_and_named(make, caplog):
    short, long = group(images=0, row=3), group(images=3, row=4)
    limit = TokenCounter(make()).one(long).prompt
    with caplog.at_level("WARNING", "unidpo"):
        fitted = fit_to_length([short, long], make(max_length=limit))
    assert fitted.groups == [short]
    assert [tokens.prompt for tokens in fitted.tokens] == [TokenCounter(make()).one(short).prompt]
    assert "1 prompts skipped (rows 4)" in caplog.text
    with pytest.raises(DataError, match="row 4"):
        fit_to_length([long], make(max_length=limit))


def test_lengths_are_those_of_what_is_left(make):
    one = group(images=1, responses=(2, 30))
    whole = TokenCounter(make()).one(one)
    limit = whole.prompt + whole.responses[0] + 3
    (fitted,) = fit_to_length([one], make(max_length=limit)).tokens
    assert fitted == GroupTokens(whole.prompt, (whole.responses[0], whole.responses[0] + 3), whole.images)


def mixed_world(folder):
    """Groups that share prompts, images and responses in all ways: pictures, texts, systems, turns, rankings."""
    rng = random.Random(3)
    paths = []
    for i in range(6):
        paths.append(folder / f"{i}.png")
        Image.new("RGB", (rng.randint(30, 300), rng.randint(30, 300))).save(paths[-1])
    turned = folder / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 60)).save(turned, exif=exif)
    first = Message("user", ("Look: ", IMAGE, " and ", IMAGE))
    talk = (Message("system", ("Be brief.",)), first, Message("assistant", ("Two.",)), Message("user", ("Sure?",)))
    prompts = [
        ((Message("user", (IMAGE, "What is it?")),), (paths[0],)),
        ((Message("user", (IMAGE, "What is it?")),), (paths[1],)),
        ((Message("user", (IMAGE, "What is it?")),), (turned,)),
        ((Message("user", (IMAGE, "What is it?")),), (picture(rng),)),
        ((Message("user", (IMAGE, "What is it?")),), (paths[2].read_bytes(),)),
        (talk, (paths[3], paths[4])),
        (talk, (paths[4], paths[3])),
        ((Message("user", ("No picture.",)),), ()),
        ((Message("user", ("long " * 400,)),), ()),
        ((*talk[:1], Message("user", ("No picture.",))), ()),
    ]
    texts = ["yes", "no", "a " * 30, "é" * 9, "Two.", "long " * 300]
    groups = []
    for row in range(60):
        messages, images = rng.choice(prompts)
        some = rng.sample(texts, 2 if row % 3 else 4)
        responses = tuple(Response(text, float(i)) for i, text in enumerate(some))
        groups.append(PromptGroup(messages, images, responses, ranked_pairs(responses, row + 1)))
    return groups


def test_lengths_of_many_groups_are_those_of_each_encoded_alone(make, tmp_path, monkeypatch):
    groups, encoder = mixed_world(tmp_path), make()
    monkeypatch.setattr("unidpo.model.lengths._TOGETHER", 7)
    for counted, one in zip(TokenCounter(encoder).count(groups), groups, strict=True):
        encoded = encoder.encode(one)
        assert (counted.prompt, counted.responses) == (len(encoded.prompt_ids), tuple(map(len, encoded.response_ids)))
        assert sum(counted.images) == encoded.mm_token_type_ids.sum()


def test_a_limit_leaves_of_many_groups_what_encode_leaves_of_each(make, tmp_path):
    groups = mixed_world(tmp_path)
    encoder = make(max_length=280)
    fitted = fit_to_length(groups, encoder)
    expected = []
    for one in groups:
        try:
            encoded = encoder.encode(one)
        except PromptTooLong:
            continue
        expected.append((one, len(encoded.prompt_ids), tuple(map(len, encoded.response_ids))))
    assert 0 < len(expected) < len(groups)
    found = zip(fitted.groups, fitted.tokens, strict=True)
    assert [(one, tokens.prompt, tokens.responses) for one, tokens in found] == expected


def test_each_distinct_prompt_is_rendered_and_each_distinct_text_tokenized_once(make, tmp_path, monkeypatch):
    groups, encoder = mixed_world(tmp_path), make()
    counter = TokenCounter(encoder)
    rendered, tokenized = [], []
    prompt_text, text_tokens = encoder.prompt_text, counter._text_tokens
    monkeypatch.setattr(encoder, "prompt_text", lambda messages: rendered.append(messages) or prompt_text(messages))
    monkeypatch.setattr(counter, "_text_tokens", lambda texts: tokenized.extend(texts) or text_tokens(texts))
    list(counter.count(groups))
    assert len(rendered) == len({one.prompt_key() for one in groups})
    assert len(tokenized) == len(rendered) + len({each.text for one in groups for each in one.responses})


def test_what_is_wrong_with_one_group_leaves_the_others(make, tmp_path):
    good, gone = ask(IMAGE, images=[Image.new("RGB", (56, 56))]), ask(IMAGE, images=[tmp_path / "gone.png"])
    spelled = ask("<|image_pad|>", IMAGE, images=[Image.new("RGB", (56, 56))])
    found = list(TokenCounter(make()).count([good, gone, spelled, good, gone]))
    assert [type(each) for each in found] == [GroupTokens, ImageError, ModelError, GroupTokens, ImageError]
    assert found[0] == found[3] == TokenCounter(make()).one(good)


def test_progress_counts_groups(make, monkeypatch):
    monkeypatch.setattr("unidpo.model.lengths._TOGETHER", 2)
    seen = []
    fit_to_length([ask("x")] * 5, make(), on_progress=lambda *numbers: seen.append(numbers))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_a_trainer_counts_groups_to_train_on_and_held_out_as_one_work(tmp_path):
    groups, seen = some_groups(5, images=lambda i: 0), []
    trainer_of(tmp_path, groups[:3], eval_dataset=groups[3:], on_progress=lambda *done: seen.append(done))
    assert seen == [("tokenizing, groups", done, 5) for done in (0, 3, 3, 5)]
