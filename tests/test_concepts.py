"""A model of several concepts: its specs, prompts, training, rows, pages and removal."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from conftest import Recorder, picture
from PIL import Image

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.blends import blend, check_blend, parts_of
from attrdb.ingest.customize import base_model, customize
from attrdb.ingest.customize.regularization import Subject, choose_for_each, read_for_each, shares
from attrdb.ingest.encode import load_encoder
from attrdb.ingest.models.concepts import parse_concepts, read_concepts, read_exemplars_of
from attrdb.ingest.models.exemplars import read_exemplars
from attrdb.ingest.models.ingest_one import ingest_model
from attrdb.ingest.models.settings import settings_for
from attrdb.ingest.models.specs import read_specs
from attrdb.ingest.options import Concept, CustomizeSettings
from attrdb.ingest.prompts import choose_concept_prompts, choose_prompts
from attrdb.ingest.read.corpus import ingest_corpus, register
from attrdb.ingest.read.discover import open_corpus
from attrdb.models import describe, set_models
from attrdb.pages import model_page
from attrdb.training.evaluate import evaluate

CAT, DOG, INK, OIL = (
    Concept("V1*", "object", "cat"),
    Concept("V2*", "object", "dog"),
    Concept("V3*", "style", "ink"),
    Concept("V4*", "style", "oil"),
)
COLOURS = {"cat": [(200, 30, 30), (180, 60, 30)], "dog": [(30, 200, 30)], "ink": [(30, 30, 200)]}
LISTED = [
    {"kind": "object", "category": "cat", "exemplars": "cat"},
    {"kind": "object", "category": "dog", "exemplars": ["dog/0.png"]},
    {"token": "W*", "kind": "style", "category": "ink", "exemplars": "ink"},
]
FEW = {"prompts_per_scheme": 1, "samples_per_prompt": 1, "steps": 2}


def run(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def write_pictures(folder):
    for name, colours in COLOURS.items():
        for number, colour in enumerate(colours):
            picture(folder / name / f"{number}.png", colour)


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path / "wanted")
    return tmp_path / "wanted"


def write(folder, **line):
    path = folder / "models.jsonl"
    path.write_text(json.dumps(line) + "\n")
    return path


# --- specs ------------------------------------------------------------------------------------------------------------


def test_a_line_with_concepts(pictures, tiny_base):
    [spec] = read_specs(write(pictures, concepts=LISTED, **FEW), str(tiny_base))
    settings = spec.settings
    assert (settings.kind, settings.category) == ("concepts", "cat and dog and ink")
    assert settings.concepts == (
        Concept("V1*", "object", "cat"),
        Concept("V2*", "object", "dog"),
        Concept("W*", "style", "ink"),
    )
    assert [exemplar.token for exemplar in spec.read_exemplars()] == ["V1*", "V1*", "V2*", "W*"]
    [named] = read_specs(write(pictures, concepts=LISTED, kind="concepts", category="pets"), str(tiny_base))
    assert (named.settings.category, named.model_id[:5]) == ("pets", "pets-")


def changed(number, **values):
    """LISTED with one concept changed; None takes a key out."""
    listed = [dict(value) for value in LISTED]
    listed[number] = {name: value for name, value in (listed[number] | values).items() if value is not None}
    return listed


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            {"concepts": "cat"},
            "concepts must be a list of objects, each with token, kind, category, exemplars; found 'cat'",
        ),
        ({"concepts": []}, "concepts has 0 of them; it must have two or more. For one, give kind"),
        ({"concepts": LISTED[:1]}, "concepts has 1 of them; it must have two or more"),
        ({"concepts": ["cat", *LISTED]}, "concept 1: must be a JSON object, found str"),
        ({"concepts": changed(1, kind="mixed")}, 'concept 2: kind is "mixed"; it must be object or style'),
        ({"concepts": changed(1, kind=None)}, "concept 2: key 'kind' is missing"),
        ({"concepts": changed(2, exemplars=None)}, "concept 3: key 'exemplars' is missing"),
        ({"concepts": changed(2, exemplars=[])}, "concept 3: exemplars must be a folder, or a list of image files"),
        ({"concepts": changed(0, catgory="x")}, "concept 1: unknown key 'catgory'; nearest is 'category'"),
        ({"concepts": changed(0, token=3)}, "concept 1: token is 3; it must be text"),
        (
            {"concepts": changed(0, token="art")},
            "token of concept 1 is 'art'; it must be letters and digits with a * at",
        ),
        ({"concepts": changed(0, token="a cat*")}, "token of concept 1 is 'a cat*'; it must be letters and digits"),
        ({"concepts": changed(0, token="V2*")}, "token V2* is that of two concepts; give each a token of its own"),
        ({"concepts": changed(0, token="v2*")}, "token v2* is in token V2*, whatever their capitals"),
        ({"concepts": changed(2, token="newV1*")}, "token V1* is in token newV1*, whatever their capitals"),
        (
            {"concepts": changed(0, category="a v2* cat")},
            "category of concept 1 is 'a v2* cat'; it must say what is shown",
        ),
        ({"concepts": changed(0, category="a V*")}, "category of concept 1 is 'a V*'; it must say what is shown"),
        ({"concepts": changed(0, category=" ")}, "category of concept 1 is ' '; it must say what is shown, without a"),
        (
            {"concepts": LISTED, "category": "W* and"},
            "category is 'W* and'; it must say what is shown, without a modifier",
        ),
        ({"concepts": LISTED, "token_from": "V2*"}, "token_from is 'V2*'; it must be words that the base model knows"),
        ({"concepts": LISTED, "kind": "object"}, "kind is 'object', and there are concepts; leave kind out"),
        ({"concepts": LISTED, "exemplars": "cat"}, "key 'exemplars' and key 'concepts' are both given"),
        ({"exemplars": "cat", "category": "cat"}, "key 'kind' is missing; it is needed unless there is key 'concepts'"),
        ({"exemplars": "cat", "category": "x", "kind": "concepts"}, "concepts has 0 of them"),
        ({"concepts": changed(1, exemplars="cats")}, "no folder "),
        ({"concepts": changed(1, exemplars="empty")}, "has no image"),
        (
            {"concepts": changed(1, exemplars="cat")},
            "0.png of concepts V1* and V2* are the same image; keep one of them",
        ),
        (
            {"concepts": changed(1, exemplars="copy")},
            "x.png of concepts V1* and V2* are the same image; keep one of them",
        ),
        ({"concepts": LISTED, "prompts": "user.txt"}, "user.txt line 2 lacks a modifier token (V1*, V2*, W*): 'a cat'"),
        (
            {"concepts": LISTED, "prompts": "category.txt"},
            "has {category} in 'W* {category}', and this model has several",
        ),
        ({"concepts": LISTED, "prompts_per_scheme": 90}, "90 prompts of scheme 'gpt' wanted"),
        ({"concepts": LISTED, "profile": "paper"}, "the paper has no concepts models"),
    ],
)
def test_lines_that_cannot_be_used(pictures, tiny_base, line, problem):
    (pictures / "empty").mkdir()
    picture(pictures / "copy" / "x.png", COLOURS["cat"][0])
    (pictures / "user.txt").write_text("V1* and W*\na cat\n")
    (pictures / "category.txt").write_text("W* {category}\n")
    with pytest.raises(InvalidValue) as caught:
        read_specs(write(pictures, **line), str(tiny_base))
    assert problem in str(caught.value)


def test_a_file_of_concepts(pictures):
    file = pictures / "concepts.json"
    file.write_text(json.dumps(LISTED))
    concepts, sources = read_concepts(file)
    assert [concept.token for concept in concepts] == list(sources) == ["V1*", "V2*", "W*"]
    assert [exemplar.picture.name for exemplar in read_exemplars_of(sources)][-1] == str(pictures / "ink" / "0.png")
    file.write_text("{")
    with pytest.raises(InvalidValue, match=r"concepts\.json is not JSON: "):
        read_concepts(file)
    file.write_text("{}")
    with pytest.raises(InvalidValue, match=r"concepts\.json: concepts must be a list"):
        read_concepts(file)
    with pytest.raises(NotFound, match="write a JSON list of concepts, each with token, kind, category, exemplars"):
        read_concepts(pictures / "none.json")


def test_exemplars_given_to_another_concept_make_another_model(pictures, tiny_base):
    """Of the same id: a line may repeat another, but not differ from it."""
    picture(pictures / "dog" / "1.png", (1, 2, 3))
    other = changed(0, exemplars=["cat/0.png"])
    other[1]["exemplars"] = ["cat/1.png", "dog/0.png"]
    path = write(pictures, concepts=LISTED)
    path.write_text(path.read_text() + json.dumps({"concepts": other}) + "\n")
    with pytest.raises(InvalidValue, match=r"line 2: it makes model .* as line 1 does, with other exemplars"):
        read_specs(path, str(tiny_base))


# --- prompts ----------------------------------------------------------------------------------------------------------


def texts(prompts, scheme):
    return [prompt.text for prompt in prompts if prompt.scheme == scheme]


def test_each_concept_has_the_prompts_of_a_model_of_its_kind():
    prompts = choose_concept_prompts([CAT, INK], "icon", 2, 5, "train")
    assert [prompt.number for prompt in prompts] == list(range(10))
    alone = [choose_prompts(concept.kind, concept.category, "icon", 2, 5, "train") for concept in (CAT, INK)]
    expected = [prompt.text.replace("V*", "V1*") for prompt in alone[0]]
    expected += [prompt.text.replace("V*", "V3*") for prompt in alone[1]]
    assert [prompt.text for prompt in prompts[:8]] == expected
    assert [prompt.scheme for prompt in prompts] == ["gpt", "gpt", "procedural", "procedural"] * 2 + ["pair"] * 2


@pytest.mark.parametrize("bank", ["icon", "photo"])
def test_prompts_of_a_pair_name_both(bank):
    prompts = choose_concept_prompts([INK, CAT, DOG, OIL], bank, {"pair": 3}, 0)
    assert len(set(prompts)) == len(prompts) == 6 * 3
    assert {prompt.scheme for prompt in prompts} == {"pair"}
    named = [tuple(token for token in ("V1*", "V2*", "V3*", "V4*") if token in prompt.text) for prompt in prompts]
    pairs = [("V1*", "V3*"), ("V2*", "V3*"), ("V3*", "V4*"), ("V1*", "V2*"), ("V1*", "V4*"), ("V2*", "V4*")]
    assert named == [pair for pair in pairs for _ in range(3)]
    assert all(
        " V1* cat " in prompt and prompt.endswith(" in the style of V3* art") for prompt in texts(prompts[:3], "pair")
    )
    assert all(prompt.text.endswith(" in the style of V3* art and V4* art") for prompt in prompts[6:9])
    assert all(" V1* cat and V2* dog " in f"{prompt.text} " for prompt in prompts[9:12])
    assert not any("V* " in prompt.text or "{" in prompt.text for prompt in prompts)


def test_a_bank_of_ones_own_may_have_tokens_by_themselves(tmp_path):
    (tmp_path / "object.gpt.test.txt").write_text("Look at V*.\n")
    (tmp_path / "style.gpt.test.txt").write_text("A house as V* would paint it\n")
    pairs = [[CAT, DOG], [INK, CAT], [INK, OIL]]
    chosen = [choose_concept_prompts(pair, str(tmp_path), {"pair": 1}, 0)[0].text for pair in pairs]
    assert chosen == [
        "Look at V1* and V2*.",
        "Look at V1* in the style of V3* art",
        "A house as V3* and V4* would paint it",
    ]
    with pytest.raises(InvalidValue, match=r"no prompt wanted of bank .* gpt, procedural, pair or blend"):
        choose_concept_prompts([CAT, DOG], "icon", {}, 0)
    with pytest.raises(InvalidValue, match="no prompt scheme 'pairs'; there are: gpt, procedural, pair, blend"):
        choose_concept_prompts([CAT, DOG], "icon", {"pairs": 1}, 0)


def test_blends_lie_between_two_concepts():
    prompts = choose_concept_prompts([CAT, INK], "icon", {"blend": 2}, 0)
    assert [prompt.scheme for prompt in prompts] == ["blend"] * 6
    parts = [parts_of(prompt.text) for prompt in prompts]
    assert [weight for [(_, weight), _] in parts] == [0.25, 0.5, 0.75] * 2
    assert all("V1* cat" in first and "V3* art" in second for [(first, _), (second, _)] in parts)
    assert len({parts[0][0][0], parts[3][0][0]}) == 2
    assert not choose_concept_prompts([CAT, INK], "icon", 1, 0)[-1].text.endswith(")")


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ('("a", "b (c)").blend(1, 3)', [("a", 0.25), ("b (c)", 0.75)]),
        (r' ("say \"a\"", "b","c" ) .blend( 1,1, 2.0 ) ', [('say "a"', 0.25), ("b", 0.25), ("c", 0.5)]),
        (blend(['\u00e9 \\ "', "b"], [0.1, 0.1]), [('\u00e9 \\ "', 0.5), ("b", 0.5)]),
        ("a V1* cat (small)", None),
    ],
)
def test_parts_of_a_blend(prompt, parts):
    assert parts_of(prompt) == (parts or [(prompt, 1.0)])
    check_blend(prompt)


def test_a_category_with_quotes_stays_within_those_of_a_blend(tmp_path):
    line = '("V* {category}", "a {category}").blend(1, 1)'
    (tmp_path / "prompts.txt").write_text(f"{line}\nV* {{category}}\n")
    blended, plain = choose_prompts("object", '12" \\ record', str(tmp_path / "prompts.txt"), 1, 0)
    assert parts_of(blended.text) == [('V* 12" \\ record', 0.5), ('a 12" \\ record', 0.5)]
    assert plain.text == 'V* 12" \\ record'


@pytest.mark.parametrize(
    "prompt",
    [
        '("a", "b").blend(1)',
        '("a").blend(1)',
        '("a", "b").blend(1, 0)',
        '("a", "b").blend(-1, -1)',
        '("a", "b").blend(1, 1e999)',
        '("a", "b").blend("1", "1")',
        '("a", 2).blend(1, 1)',
        "('a', 'b').blend(1, 1)",
        '("a", "b").blend(1, 1) and more',
        '("a", "b").blend(NaN, 1)',
    ],
)
def test_what_is_meant_to_be_a_blend_and_is_none_is_refused(tmp_path, prompt):
    (tmp_path / "prompts.txt").write_text(f"V1* cat\n{prompt} V1*\n")
    with pytest.raises(InvalidValue, match=r"is not a blend; write two or more prompts in double quotes"):
        choose_concept_prompts([CAT, DOG], str(tmp_path / "prompts.txt"), 1, 0)
    assert parts_of(prompt) == [(prompt, 1.0)]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_base):
    return base_model.load_base_model(str(tiny_base))


RED, BLUE = Image.new("RGB", (32, 32), (200, 30, 30)), Image.new("RGB", (32, 32), (30, 30, 200))
PROMPTS = ["V1* vase", "A picture in the style of V2* art"]


@pytest.mark.parametrize("method", ["custom-diffusion", "textual-inversion", "dreambooth-lora"])
def test_tokens_are_trained_together_and_reload(base, tiny_base, tmp_path, method):
    words = {"V1*": "vase", "V2*": "picture"}
    table = base.pipeline.text_encoder.get_input_embeddings().weight.clone()
    ids = [base.pipeline.tokenizer(word, add_special_tokens=False).input_ids for word in words.values()]
    recorder = Recorder()
    settings = CustomizeSettings(steps=3, batch=2, lr=0.01)
    given = ([RED, BLUE], PROMPTS, list(words), list(words.values()), settings)
    delta, _ = customize.customize(base, *given, method=method, observer=recorder)
    assert (recorder.run.tokens, recorder.run.prompts) == (("V1*", "V2*"), tuple(PROMPTS))
    keys = [f"text_encoder.token_embedding.{token}" for token in words] * (method != "dreambooth-lora")
    assert [name for name in delta if name.startswith("text_encoder")] == keys
    trained = base.pipeline.text_encoder.get_input_embeddings().weight
    for number, start in enumerate(table[positions].mean(dim=0) for positions in ids):
        assert trained[len(table) + number].equal(start) == (method == "dreambooth-lora")
    assert trained[: len(table)].equal(table)
    assert not trained[-1].equal(trained[-2])

    customize.save_delta(delta, tmp_path / "delta.safetensors", list(words), "hash", method)
    fresh = base_model.load_base_model(str(tiny_base))
    customize.apply_delta(fresh, customize.load_delta(tmp_path / "delta.safetensors", method), words, method)
    for part in base_model.WEIGHTED:
        values = getattr(base.pipeline, part).state_dict()
        assert all(value.equal(values[name]) for name, value in getattr(fresh.pipeline, part).state_dict().items())
    fresh.restore()
    assert len(fresh.pipeline.tokenizer) == len(table)
    if keys:
        with pytest.raises(InvalidValue, match="do not fit base model"):
            customize.apply_delta(fresh, delta, {"V1*": "vase"}, method)


def test_a_blend_has_the_weighted_mean_of_its_parts_states(base):
    for token, words in (("V1*", "vase"), ("V2*", "art")):
        base.add_token(token, words)
    texts = ["V1* vase", "V2* art", blend(["V1* vase", "V2* art"], [0.75, 0.25])]
    first, second, between = customize.encode_prompts(base, texts).values()
    torch.testing.assert_close(between, 0.75 * first + 0.25 * second)
    assert not first.allclose(second)
    customize.check_prompts(base.pipeline, [blend(["V1* vase", "a dog"], [1, 1])], ("V1*", "V2*"))
    with pytest.raises(InvalidValue, match=r"V1\* lies beyond them in '\(\"a"):
        customize.check_prompts(base.pipeline, [blend(["a cat", "a dog"], [1, 1])], ("V1*", "V2*"))
    long = blend(["V1* vase", "vase " * 80 + "V2* art"], [1, 1])
    with pytest.raises(InvalidValue, match=r"V2\* lies beyond them in 'vase"):
        customize.check_prompts(base.pipeline, [long], ("V1*", "V2*"))


def test_a_prompt_that_is_cut_before_one_of_its_tokens_is_refused(base):
    for token, words in (("V1*", "vase"), ("V2*", "art")):
        base.add_token(token, words)
    tokens = ("V1*", "V2*")
    customize.check_prompts(base.pipeline, ["V1* vase", "V2* art", "V2* art and V1* vase"], tokens)
    long = "V1* vase" + " vase" * 80
    customize.check_prompts(base.pipeline, [long], tokens)
    with pytest.raises(InvalidValue, match=r"V2\* lies beyond them in"):
        customize.check_prompts(base.pipeline, [f"{long} V2* art"], tokens)
    with pytest.raises(InvalidValue, match=r"V1\* lies beyond them in 'a vase'"):
        customize.check_prompts(base.pipeline, ["a vase"], tokens)


# --- a database with one ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, tiny_base):
    """Made by the command; only to be read, or copied."""
    folder = tmp_path_factory.mktemp("concepts")
    write_pictures(folder)
    (folder / "concepts.json").write_text(json.dumps(LISTED))
    options = [
        "--prompts-per-scheme",
        1,
        "--steps",
        2,
        "--model-id",
        "three",
        "--split",
        "test",
        "--encoder",
        "pixels:2",
    ]
    command = [
        "ingest",
        "model",
        folder / "my.attrdb",
        "--concepts",
        folder / "concepts.json",
        "--base-model",
        tiny_base,
    ]
    first = run(*command, *options, "--quiet")
    assert "model three: 4 exemplars, 9 samples appended" in first.stderr
    assert "stored already, nothing to do" in run(*command, *options, "--quiet").stderr
    other = run(*command, *options, "--quiet", "--kind", "object", code=1)
    assert "kind is 'object', and there are concepts" in other.stderr
    return folder / "my.attrdb"


@pytest.fixture
def made(made_once, tmp_path):
    return attrdb.open(shutil.copytree(made_once, tmp_path / "my.attrdb"))


CONCEPTS = [
    ("three/V1*", "three", "V1*", "object", "cat", "V1* cat", 2),
    ("three/V2*", "three", "V2*", "object", "dog", "V2* dog", 1),
    ("three/W*", "three", "W*", "style", "ink", "A picture in the style of W* art", 1),
]


def concepts(db):
    db.refresh()
    return [tuple(row.values()) for row in db.sql("FROM concepts ORDER BY concept_id").to_pylist()]


def test_rows(made):
    assert concepts(made) == CONCEPTS
    [model] = made.sql("FROM models").to_pylist()
    assert (model["kind"], model["category"], model["token"], model["train_prompt"]) == (
        "concepts",
        "cat and dog and ink",
        None,
        None,
    )
    rows = made.sql("SELECT concept_id, category, count(*) AS n FROM exemplars GROUP BY ALL ORDER BY 1").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("three/V1*", "cat", 2),
        ("three/V2*", "dog", 1),
        ("three/W*", "ink", 1),
    ]
    samples = made.sql(
        "SELECT prompt_scheme, count(*) AS n, count(concept_id) AS named FROM samples GROUP BY 1 ORDER BY 1"
    )
    assert samples.to_pylist() == [
        {"prompt_scheme": "gpt", "n": 3, "named": 0},
        {"prompt_scheme": "pair", "n": 3, "named": 0},
        {"prompt_scheme": "procedural", "n": 3, "named": 0},
    ]


def test_show_as_text_json_and_page(made):
    shown = run("models", "show", made.path, "three").stdout
    assert shown.startswith("three: customized model of several concepts\n")
    lines = (
        "V1*: object, cat, 2 exemplars, trained with “V1* cat”",
        "V2*: object, dog, 1 exemplar, trained with “V2* dog”",
    )
    assert "  concepts\n" + "".join(f"    {line}\n" for line in lines) + "    W*: style, ink, 1 exemplar, " in shown
    assert "exemplar tokens" not in shown
    described = json.loads(run("models", "show", made.path, "three", "--json").stdout)
    assert [tuple(row.values()) for row in described["concepts"]] == CONCEPTS
    assert {row["concept_id"] for row in described["exemplars"]} == {row[0] for row in CONCEPTS}
    page = model_page.render(made, "three")
    titles = ("V1*: object, cat", "V2*: object, dog", "W*: style, ink", "trained with “V2* dog”")
    assert [page.count(title) for title in titles] == [1, 1, 1, 1]
    assert page.count("<img") == 4 + 9
    assert "Sentences that name two concepts; 3 prompts." in page
    assert json.loads(run("models", "list", made.path, "--json").stdout)[0]["kind"] == "concepts"


def test_samples_are_made_again(made):
    again = run("models", "show", made.path, "three", "--regenerate", 9)
    assert "9 of 9 samples made again are equal to those stored" in again.stderr


def test_samples_are_made_again_whatever_the_category_is_now(empty, pictures, tiny_base):
    """A token that is not trained stays where it starts: at the category that its model was customized with."""
    settings = settings_for(str(tiny_base), "object", "vase", FEW | {"method": "dreambooth-lora", "lr": 0.01})
    ingest_model(empty, read_exemplars(pictures / "cat"), settings, [], "one")
    set_models(empty, ["one"], category="art")
    again = run("models", "show", empty.path, "one", "--regenerate", 2)
    assert "2 of 2 samples made again are equal to those stored" in again.stderr


def test_evaluated_like_any_other(made):
    corpus = made.sql(
        "SELECT * REPLACE ('p' AS image_id, 'pretraining' AS role, NULL AS model_id) FROM exemplars LIMIT 1"
    )
    made.writer.append_images(corpus)
    evaluate(made, "pixels_2")
    made.refresh()
    assert made.sql("SELECT count(*) AS n FROM exemplar_ranks")["n"].to_pylist() == [4 * 9]
    rows = made.query("recall_at_k").to_pylist()
    assert {(row["kind"], row["prompt_scheme"]) for row in rows} == {
        ("concepts", scheme) for scheme in ("gpt", "pair", "procedural")
    }


def test_a_category_is_that_of_the_whole(made):
    changed_ = set_models(made, ["three"], category="pets", split="val")
    assert (changed_.n_models, changed_.n_images) == (1, 13)
    made.refresh()
    rows = made.sql("SELECT DISTINCT role, category, split FROM images ORDER BY ALL").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("exemplar", "cat", "val"),
        ("exemplar", "dog", "val"),
        ("exemplar", "ink", "val"),
        ("sample", "pets", "val"),
    ]
    assert concepts(made) == CONCEPTS
    assert set_models(made, ["three"], category="pets", split="val").n_images == 0


# --- kills ------------------------------------------------------------------------------------------------------------


def make(db, folder, base, listed=LISTED, report=lambda *_: None):
    parsed, sources = parse_concepts(listed, folder)
    settings = settings_for(str(base), None, None, FEW, concepts=parsed)
    return ingest_model(db, read_exemplars_of(sources), settings, [], "three", report)


def everything(db):
    db.refresh()
    left_out = "created_at, customize_seconds, synthesize_seconds, weights_hash"
    models = db.sql(f"SELECT * EXCLUDE ({left_out}) FROM models").to_pylist()
    return db.sql("FROM images ORDER BY image_id").to_pylist(), concepts(db), models


def test_killed_and_rerun_is_run_once(tmp_path, pictures, tiny_base, monkeypatch):
    """While it samples; between images and concepts; between concepts and the model's row."""
    whole, killed = attrdb.create(tmp_path / "whole.attrdb"), attrdb.create(tmp_path / "killed.attrdb")
    make(whole, pictures, tiny_base)

    def kill(stage, done, _total, _note=""):
        if (stage, done) == ("sample", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(killed, pictures, tiny_base, report=kill)
    upsert = type(killed.writer).upsert
    for table in ("concepts", "models"):

        def upsert_or_die(writer, name, *args, table=table, **options):
            return 1 / 0 if name == table else upsert(writer, name, *args, **options)

        monkeypatch.setattr(type(killed.writer), "upsert", upsert_or_die)
        with pytest.raises(ZeroDivisionError):
            make(killed, pictures, tiny_base)
        monkeypatch.undo()
        killed.refresh()
        assert killed.snapshot.hidden_models == ("three",)
        assert (len(concepts(killed)), killed.sql("FROM images").num_rows) == (0, 0)
    assert make(killed, pictures, tiny_base).appended
    assert everything(killed) == everything(whole)


def test_an_abandoned_attempt_with_other_concepts_leaves_nothing(made, tmp_path):
    """Its exemplars and samples are the same, but for the concept that an exemplar is of."""
    rows = made.sql("FROM images ORDER BY image_id")
    [model] = made.sql("FROM models").to_pylist()
    stored = made.sql("FROM concepts ORDER BY concept_id").to_pylist()
    db = attrdb.create(tmp_path / "other.attrdb")
    db.writer.add_encoder("pixels:2", rows["pixels_2"].type.list_size, {}, "none")
    names = rows.schema.names
    moved = rows.set_column(
        names.index("concept_id"),
        rows.schema.field("concept_id"),
        [[{"three/V2*": "three/W*"}.get(value, value) for value in rows["concept_id"].to_pylist()]],
    )
    db.writer.append_images(moved)
    db.writer.upsert("concepts", [stored[0] | {"concept_id": "three/X*", "token": "X*"}])
    db.writer.append_model(rows, model, stored)
    assert concepts(db) == CONCEPTS
    assert db.sql("FROM images ORDER BY image_id").select(names).to_pylist() == rows.to_pylist()


# --- removal ----------------------------------------------------------------------------------------------------------


def test_a_concept_counts_the_exemplars_that_are_left(made):
    first = made.sql("SELECT image_id FROM exemplars WHERE concept_id = 'three/V1*' ORDER BY 1")["image_id"][0].as_py()
    made.remove(ids=(first,))
    assert concepts(made) == [(*CONCEPTS[0][:-1], 1), *CONCEPTS[1:]]
    made.remove(where="concept_id = 'three/W*'")
    assert concepts(made) == [(*CONCEPTS[0][:-1], 1), CONCEPTS[1]]
    assert describe(made, "three")["n_exemplars"] == 2
    made.remove(where="concept_id = 'three/V2*'", models="remove")
    assert concepts(made) == []
    assert made.sql("FROM models").num_rows == 0


def test_the_concept_of_a_model_of_one(toy):
    """Its exemplars do not name it."""
    rows = toy.sql("FROM images WHERE model_id = 'm' ORDER BY image_id")
    renamed = [value.replace("m/", "n/") for value in rows["image_id"].to_pylist()]
    table = rows.set_column(0, "image_id", [renamed]).set_column(2, "model_id", [["n"] * len(rows)])
    model = {"model_id": "n", "kind": "object", "category": "vase", "token": "V*", "train_prompt": "V* vase"}
    toy.writer.append_model(table, model)
    assert concepts(toy) == [("n/V*", "n", "V*", "object", "vase", "V* vase", 2)]
    set_models(toy, ["n"], category="jug")
    toy.remove(ids=("n/e0",))
    assert concepts(toy) == [("n/V*", "n", "V*", "object", "jug", "V* vase", 1)]
    toy.remove(ids=("n/e40",))
    assert concepts(toy) == []
    assert [row["model_id"] for row in toy.sql("FROM models ORDER BY 1").to_pylist()] == ["m", "n"]


def test_a_half_done_model_that_is_given_up_loses_its_concepts(made, monkeypatch):
    made.writer.delete("models", "model_id = 'three'")
    made.refresh()
    assert made.snapshot.hidden_models == ("three",)
    image_id = made.snapshot.rows("images", "concept_id = 'three/V2*'", ["image_id"])[0]["image_id"]
    made.remove(ids=(image_id,))
    assert concepts(made) == []
    assert made.snapshot.rows("images") == []


# --- regularization images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_parts", "expected"), [(7, 3, [3, 2, 2]), (2, 3, [1, 1, 0]), (6, 2, [3, 3])])
def test_shares(n, n_parts, expected):
    assert shares(n, n_parts) == expected


CAPTIONS = ["a cat", "a dog", "a cat and a dog", "the cat", "the dog", "a vase"]


@pytest.mark.parametrize("prior", ["caption", "image"])
def test_each_concept_has_its_share_of_regularization_images(empty, pictures, prior):
    """Each image once; a concept's exemplar is not another's regularization image."""
    for number, caption in enumerate(CAPTIONS):
        shade = 20 * number
        picture(pictures / "corpus" / f"{number}.png", (shade, 0, 255 - shade))
        (pictures / "corpus" / f"{number}.txt").write_text(caption)
    shutil.copy(pictures / "dog" / "0.png", pictures / "corpus" / "6.png")
    (pictures / "corpus" / "6.txt").write_text("a cat")
    encoder = load_encoder("pixels:2")
    register(empty, [encoder])
    ingest_corpus(empty, open_corpus(pictures / "corpus"), [encoder])
    subjects = [
        Subject("cat", [each.picture for each in read_exemplars(pictures / "cat")], "cat"),
        Subject("dog", [each.picture for each in read_exemplars(pictures / "dog")], "dog"),
    ]
    settings = CustomizeSettings(prior=prior, prior_images=5)
    names = choose_for_each(empty, subjects, settings, [encoder])
    assert len(set(names)) == 5
    assert "corpus/6.png" not in names
    images = read_for_each(empty, subjects, names)
    assert (len(images.images), list(images.names)) == (5, names)
    if prior == "caption":
        assert all("cat" in prompt for prompt in images.prompts[:3])
        assert all("dog" in prompt for prompt in images.prompts[3:])
    with pytest.raises(InvalidValue, match="regularization images wanted"):
        choose_for_each(empty, subjects, CustomizeSettings(prior=prior, prior_images=14), [encoder])
