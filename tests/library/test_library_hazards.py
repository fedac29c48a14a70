"""What a skeptical review found in vector files, fingerprints and libraries stays mended."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import save

from lm_eval_aft import AFTError, SteeringVector, attach, load_vector
from lm_eval_aft.cli.vectors import vectors as command
from lm_eval_aft.library.entry import Entry, read_entry
from lm_eval_aft.library.hub import Remote, choose, pull
from lm_eval_aft.library.load import folder_of
from lm_eval_aft.library.routers import parse_keyword_table, parse_task_table, task_table
from lm_eval_aft.library.store import Library
from lm_eval_aft.steering.fingerprint import compare_fingerprints, fingerprint
from lm_eval_aft.steering.vector import describe_vector
from lm_eval_aft.steering.vector_file import is_biased, read_header
from lm_eval_aft.studies.config import read_library_study
from tests.support.families import tiny_model


def a_vector(value: float = 1.0, width: int = 4, **metadata: Any) -> SteeringVector:
    return SteeringVector({1: torch.full((width,), value)}, metadata=metadata)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """math/a and math/b, of ones and of twos."""
    library = Library(tmp_path / "library")
    a_vector(1.0).save(library.root / "math/a")
    a_vector(2.0).save(library.root / "math/b")
    return library


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit | AFTError)
    return result


def refused(word: str, *arguments: object) -> None:
    """A command ends with one `AFTError` that says ``word``."""
    result = CliRunner().invoke(command, list(map(str, arguments)))
    told = result.exception.what if isinstance(result.exception, AFTError) else result.output
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit | AFTError), repr(result.exception)
    assert word in told


def changed(family: str, **settings: Any) -> tuple[Any, Any]:
    """A tiny model, and its weights under other settings."""
    one = tiny_model(family)
    config = copy.deepcopy(one.config)
    for key, value in settings.items():
        setattr(config, key, value)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("gpt_neox", {"layer_norm_eps": 0.1}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma2", {"attn_logit_softcapping": 2.0}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("granite", {"embedding_multiplier": 12.0}),
        ("granite", {"attention_multiplier": 0.01}),
        ("granite", {"logits_scaling": 8.0}),
        (
            "phi",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,
                }
            },
        ),
        ("gemma", {"hidden_activation": "relu"}),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                }
            },
        ),
    ],
)
def test_the_same_weights_under_other_settings_differ(family: str, settings: dict[str, Any]) -> None:
    one, other = changed(family, **settings)
    recorded = fingerprint(one)
    found = compare_fingerprints(recorded, fingerprint(other))
    assert any("settings of the computation" in each for each in found)
    old = {key: value for key, value in recorded.items() if key != "computation"}
    assert compare_fingerprints(old, fingerprint(other)) == []  # as vectors made before always were


def test_the_settings_survive_a_checkpoint_and_a_dtype(tmp_path: Path) -> None:
    for family in ("llama", "gpt_neox", "gemma2", "granite", "phi", "gemma3_text"):
        model = tiny_model(family)
        recorded = fingerprint(model)
        model.save_pretrained(tmp_path / family)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.bfloat16)
        assert compare_fingerprints(recorded, fingerprint(again)) == []


def test_unset_and_missing_settings_are_one() -> None:
    model = tiny_model("llama")
    found = []
    for rope in ({"factor": 4}, {"factor": 4.0, "low_freq_factor": None}):
        other = copy.deepcopy(model)
        other.config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, **rope}
        found.append(fingerprint(other))
    assert compare_fingerprints(*found) == []


def test_weights_on_disk_are_told_not_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    metadata = {"fingerprint": fingerprint(model), "base_model": {"name": "org/m"}}
    vector = a_vector(width=32, **metadata)
    attach(model, vector).remove()
    assert not caplog.records
    part = copy.deepcopy(model)
    part.lm_head.to("meta")
    attach(part, vector).remove()
    assert not caplog.records  # most of it could be compared
    attach(tiny_model("llama", seed=9).to("meta"), vector).remove()
    assert "none of them could be" in caplog.text


def test_a_sum_names_one_model(library: Library) -> None:
    identity = fingerprint(tiny_model("llama"))
    a_vector(fingerprint=identity).save(library.root / "m/printed")
    a_vector(base_model={"name": "org/one"}, num_hidden_layers=6).save(library.root / "m/one")
    a_vector(2.0, base_model={"name": "org/two"}).save(library.root / "m/two")
    both = load_vector("m/printed + m/one", library).metadata
    assert both["fingerprint"] == identity
    assert "base_model" not in both
    assert "num_hidden_layers" not in both
    with pytest.raises(AFTError, match="names of the base models differ"):
        load_vector("m/one + m/two", library)
    a_vector(3.0, fingerprint=identity, base_model={"name": "org/two"}).save(library.root / "m/three")
    with pytest.raises(AFTError, match="'org/one'.*names of the base models differ"):
        load_vector("m/one + m/three", library)
    assert load_vector("m/two + math/a", library).metadata["base_model"] == {"name": "org/two"}


def test_a_sum_is_no_tasks_own_vector() -> None:
    own = Entry("math/a", tasks=("gsm8k",))
    composed = Entry("math/half", tasks=("gsm8k",), recipe="math/a*0.5")
    assert task_table([own, composed]) == {"gsm8k": "math/a"}
    with pytest.raises(AFTError, match="No vector of the library"):
        task_table([composed])


@pytest.mark.parametrize("protocol", [{"biased": True}, {"name": "biased"}])
def test_biased_is_told_in_one_way(library: Library, protocol: dict[str, Any]) -> None:
    vector = a_vector(protocol=protocol)
    vector.save(library.root / "m/biased")
    assert is_biased(vector.metadata)
    assert describe_vector(vector)["biased"]
    assert read_entry("m/biased", library.root / "m/biased").control == "biased"
    assert load_vector("m/biased*2", library).metadata["protocol"]["biased"]
    assert not is_biased({"protocol": "biased"})


def test_an_interrupted_replacement_leaves_the_old_vector(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = a_vector(9.0).save(tmp_path / "new").parent
    rename, seen = Path.rename, list[Path]()

    def interrupted(self: Path, target: Path) -> Path:
        if target == library.root / "math/a":
            seen.append(self)
            if len(seen) == 2:  # the old one is aside, the new one not in its place
                raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.add(new, "math/a", replace=True)
    assert float(load_vector("math/a", library).layers[1][0]) == 1.0
    assert {each.name for each in library.root.iterdir()} == {"math"}


def test_nothing_outside_is_reached_through_a_linked_category(library: Library, tmp_path: Path) -> None:
    outside = a_vector().save(tmp_path / "outside/v")
    (library.root / "linked").symlink_to(tmp_path / "outside")
    refused("is a symbolic link", "remove", "linked/v", "--yes", "--library", library.root)
    assert outside.exists()
    with pytest.raises(AFTError, match="is a symbolic link"):
        load_vector("linked/v", library)


def test_vectors_that_would_share_a_name_are_refused_before_the_download(tmp_path: Path) -> None:
    files = {"vector.safetensors": 10}
    remote = Remote("me/vecs", "a" * 40, {"": files, "me/vecs": files})
    shelf = Library(tmp_path / "library")
    for replace in (False, True):
        with pytest.raises(AFTError, match="would both be called me/vecs"):
            pull(remote, shelf, replace=replace)
    assert not shelf.root.exists()
    assert choose(remote, ["me/vecs", "me/vecs"]) == ["me/vecs"]


def test_a_sum_is_written_to_both_places_or_to_none(library: Library, tmp_path: Path) -> None:
    where = ("--library", library.root)
    out = tmp_path / "sum.safetensors"
    refused("names a file", "compose", "math/a*0.5", "-o", out, *where)
    assert not out.exists()
    out = tmp_path / "sum"
    refused("already has 'math/b'", "compose", "math/a*0.5", "-o", out, "--name", "math/b", *where)
    refused("cannot name a vector", "compose", "math/a*0.5", "-o", out, "--name", "half", *where)
    (tmp_path / "file").write_text("")
    blocked = ("-o", tmp_path / "file/sum", "--name", "math/half")
    refused("Cannot write", "compose", "math/a*0.5", *blocked, *where)
    assert not out.exists()
    assert library.names() == ["math/a", "math/b"]
    out.mkdir()
    run("compose", "math/a*0.5", "-o", out, "--name", "math/half", *where)
    assert {each.name for each in out.iterdir()} == {"README.md", "vector.safetensors"}
    assert {each.name for each in tmp_path.iterdir()} == {"library", "file", "sum"}
    assert load_vector("math/half", library).digest() == SteeringVector.load(out).digest()


def a_file(place: Path, tensors: dict[str, torch.Tensor], **header: Any) -> Path:
    """A file in the form of a vector's, with these tensors and this header."""
    own = {"method": "static", "layers": [7], "coefficient": 1.0, "positions": "all", "hidden_size": 4}
    place.write_bytes(save(tensors, {"format": "aft/1", "aft": json.dumps(own | header)}))
    return place


@pytest.mark.parametrize(
    ("names", "header"),
    [
        (["layers." + "7" * 5000], {}),
        (["layers.\u00b2"], {}),
        (["layers.7", "layers.07"], {}),
        (["layers.07"], {}),
        (["layers."], {}),
        (["layers.7"], {"hidden_size": 0}),
    ],
)
def test_odd_tensors_are_refused_by_both_readers(
    tmp_path: Path, names: list[str], header: dict[str, Any]
) -> None:
    width = header.get("hidden_size", 4)
    path = a_file(tmp_path / "v.safetensors", {name: torch.ones(width) for name in names}, **header)
    for read in (SteeringVector.load, read_header):
        with pytest.raises(AFTError) as caught:
            read(path)
        assert len(caught.value.what) < 500
    with pytest.raises(AFTError):
        SteeringVector.from_tensors({name: torch.ones(width) for name in names})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, "\ud800"])
def test_metadata_that_no_file_can_hold(tmp_path: Path, value: Any) -> None:
    with pytest.raises(AFTError, match="metadata cannot be written"):
        a_vector(loss=value).save(tmp_path / "v")
    assert not list(tmp_path.rglob("*.*"))


def test_a_coefficient_is_a_finite_number_and_keeps_the_digest(tmp_path: Path) -> None:
    vector = SteeringVector({0: torch.ones(4)}, coefficient=2)
    vector.save(tmp_path)
    assert SteeringVector.load(tmp_path).digest() == vector.digest()
    assert vector.digest() == SteeringVector({0: torch.ones(4)}, coefficient=2.0).digest()
    for bad in (float("nan"), float("inf"), 10**400, None, "many"):
        with pytest.raises(AFTError, match="coefficient"):
            SteeringVector({0: torch.ones(4)}, coefficient=bad)  # type: ignore[arg-type]


def test_a_handed_over_folder_cannot_say_where_it_comes_from(library: Library, tmp_path: Path) -> None:
    handed = a_vector().save(tmp_path / "handed").parent
    forged = {"repo": "official/v", "vector": None, "commit": "a" * 40, "pulled": "2026-01-01", "files": {}}
    (handed / "source.json").write_text(json.dumps(forged))
    library.add(handed, "x/forged")
    assert not (library.root / "x/forged/source.json").exists()
    assert "official" not in run("show", "x/forged", "--library", library.root).output


def test_a_deep_source_record_is_damaged_not_a_crash(library: Library) -> None:
    (library.root / "math/a/source.json").write_text("[" * 100_000)
    assert "damaged" in run("show", "math/a", "--library", library.root).output


def test_text_from_files_steers_no_terminal(library: Library) -> None:
    title, override, c1 = "\x1b]0;PWNED\x07", "\u202e", "\x9b31m"
    bad = f"{title}good\nfake/row{override}{c1}"
    a_vector(task=bad, base_model={"name": bad}, created=bad).save(library.root / "x/bad")
    where = ("--library", library.root)
    for arguments in (("list",), ("show", "x/bad"), ("list", "--json"), ("show", "x/bad", "--json")):
        output = run(*arguments, *where).output
        assert "PWNED" in output
        assert all(c.isprintable() or c == "\n" for c in output)
        assert not any(line.startswith("fake/row") for line in output.splitlines())
    (entry,) = json.loads(run("list", "--json", "--category", "x", *where).output)
    assert entry["tasks"] == [bad]


def test_verify_wants_a_library_that_exists(library: Library, tmp_path: Path) -> None:
    refused("There is no library", "verify", "--library", tmp_path / "typo")
    assert "2 vectors, all sound" in run("verify", "--library", library.root).output


def test_a_folder_without_a_vector_hides_no_name(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math/a").mkdir(parents=True)
    assert float(load_vector("math/a", library).layers[1][0]) == 1.0
    assert folder_of("math/a", library) == library.root / "math/a"
    (tmp_path / "math/a/README.md").write_text("data")
    pushed = run("push", "math/a", "--repo", "me/x", "--dry-run", "--library", library.root).output
    assert "vector.safetensors" in pushed
    (tmp_path / "empty").mkdir()
    with pytest.raises(AFTError, match=r"No steering vector at empty"):
        load_vector("empty", library)
    a_vector(7.0).save(tmp_path / "math/a")
    assert float(load_vector("math/a", library).layers[1][0]) == 7.0
    assert folder_of("math/a", library) == Path("math/a")


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
RULES = "rules:\n- {vector: math/a, words: [sum]}\n"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (BOMB, "aliases come to more"),
        ("rules: &a [*a]", "part of"),
        ("tasks: {gsm8k: math/a, gsm8k: none}", "occurs twice"),
        (RULES + RULES, "occurs twice"),
        ("rules:\n- {vector: math/a, vector: none, words: [sum]}\n", "occurs twice"),
        ("[" * 50_000, "nested too deeply"),
        ("? [a]\n: b", "not YAML"),
    ],
)
def test_tables_and_studies_refuse_what_yaml_hides(tmp_path: Path, text: str, word: str) -> None:
    for parse in (parse_keyword_table, parse_task_table):
        with pytest.raises(AFTError, match=word):
            parse(text)
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(AFTError, match=word):
        read_library_study(path)
