"""Files that nobody should trust are refused with one sentence, nothing in it runs, no memory is taken for it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_samples import D_IN, D_SAE, K, four, make, write_npz, write_saelens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saelab.errors import ArtifactError, SaelabError
from saelab.sae.formats.files import MAX_HEADER_BYTES, MAX_JSON_BYTES
from saelab.sae.io import load_sae, save_sae, save_sae_as

V6 = {"d_in": D_IN, "d_sae": D_SAE, "architecture": "standard", "metadata": {"sae_lens_version": "6.54.12"}}


def refused(path: Path, match: str) -> None:
    """The SAE at ``path`` is refused with one sentence that matches."""
    with pytest.raises(SaelabError, match=match) as caught:
        load_sae(path)
    assert len(str(caught.value)) < 700


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, cage: Path) -> None:
        self.cage = cage

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.mkdir, (str(self.cage),))


def dictionary_learning_state() -> dict[str, Any]:
    tensors = four()
    return {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "b_dec": tensors["b_dec"],
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": torch.tensor(0.5),
    }


def dictionary_learning(path: Path, content: Any = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    torch.save(dictionary_learning_state() if content is None else content, path / "ae.pt")
    (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}))
    return path


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path):
    cage = tmp_path / "cage"
    with torch.serialization.safe_globals([]):
        dictionary_learning(tmp_path, dictionary_learning_state() | {"extra": Canary(cage)})
    refused(tmp_path, "holds more than tensors or is damaged, so it is not loaded and nothing in it was run")
    assert not cage.exists()
    torch.load(tmp_path / "ae.pt", weights_only=False)  # the trap works: this is what would have happened
    assert cage.exists()
    cage.rmdir()

    for protocol in (0, 2, 4):  # plain pickles, without the zip around them
        (tmp_path / "ae.pt").write_bytes(pickle.dumps(Canary(cage), protocol=protocol))
        refused(tmp_path, "not in the zip layout of torch.save")
        assert not cage.exists()


def test_the_old_layout_of_torch_save_is_refused(tmp_path: Path):
    dictionary_learning(tmp_path)
    torch.save(dictionary_learning_state(), tmp_path / "ae.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path, "not in the zip layout of torch.save")


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {1: torch.ones(3)}, "text"])
def test_a_pt_file_that_holds_no_state_dict_is_refused(content, tmp_path: Path):
    refused(dictionary_learning(tmp_path, content), "holds no table of tensors")


def test_tensors_of_strange_kinds_are_refused(tmp_path: Path):
    state = dictionary_learning_state()
    for strange, sentence in (
        (torch.ones(D_SAE).to_sparse(), "but weights are floating-point|holds more than tensors"),
        (torch.ones(D_SAE, dtype=torch.complex64), "as torch.complex64"),
        (torch.ones(D_SAE, dtype=torch.int64), "as torch.int64"),
        (torch.ones(D_SAE).to(torch.float8_e4m3fn), "as torch.float8_e4m3fn"),
        (torch.ones(1).expand(D_SAE + 1), r"of shape \[41\]"),
        ([1.0] * D_SAE, "but it must be a tensor"),
        (None, "but it must be a tensor"),
    ):
        refused(dictionary_learning(tmp_path, state | {"encoder.bias": strange}), sentence)


def test_a_pt_record_that_claims_more_than_it_has_is_not_read_beyond(tmp_path: Path):
    dictionary_learning(tmp_path)
    with zipfile.ZipFile(tmp_path / "ae.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    records = sorted(name for name in entries if "/data/" in name)
    biggest = max(records, key=lambda name: len(entries[name]))
    entries[biggest] = entries[biggest][:16]  # the pickle still says 9 x 40 numbers
    with zipfile.ZipFile(tmp_path / "ae.pt", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    refused(tmp_path, "bytes of tensors that claim")


def test_compressed_pt_files_are_refused_before_they_are_unpacked(tmp_path: Path):
    dictionary_learning(tmp_path)
    with zipfile.ZipFile(tmp_path / "ae.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    entries["archive/data/99"] = bytes(50 * 2**20)
    with zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert (tmp_path / "ae.pt").stat().st_size < 2**20
    refused(tmp_path, "packed more tightly than torch.save does")


def test_an_npz_bomb_is_refused_before_it_is_unpacked(tmp_path: Path):
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"shape": (40, 2**20), "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", huge.getvalue() + bytes(40 * 2**20 * 4))
    refused(tmp_path, "would unpack W_enc.npy to 167,772,288 bytes")


def test_an_npz_array_larger_than_its_entry_is_refused_before_memory_is_taken(tmp_path: Path):
    lie = io.BytesIO()
    np.lib.format.write_array_header_1_0(lie, {"shape": (2**40, 2**20), "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", lie.getvalue() + bytes(64))
    refused(tmp_path, "whose size differs from its shape")


def test_an_npz_array_of_objects_is_refused_and_not_run(tmp_path: Path):
    cage = tmp_path / "cage"
    tensors: dict[str, Any] = {name: tensor.numpy() for name, tensor in four().items()}
    np.savez(tmp_path / "params.npz", **tensors, threshold=np.array([Canary(cage)], dtype=object))
    refused(tmp_path, "of type object, but weights are numbers")
    assert not cage.exists()


def test_npz_names_that_climb_are_only_unknown_names(tmp_path: Path):
    tensors = four() | {"threshold": torch.ones(D_SAE), "../../evil": torch.ones(3)}
    refused(write_npz(tmp_path / "a", tensors), r"holds \.\./\.\./evil, which an SAE of Gemma Scope does not have")
    refused(
        write_npz(tmp_path / "b", tensors | {"/tmp/evil": torch.ones(3)}), "which an SAE of Gemma Scope does not have"
    )
    assert not (tmp_path / "evil.npy").exists()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "truncated or no safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "truncated or no safetensors file"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 8) + b"{" + b" " * (MAX_HEADER_BYTES + 7), "a header of"),
        (struct.pack("<Q", 2) + b"[]", "truncated or no safetensors file"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "truncated or no safetensors file"),
        (b"", "truncated or no safetensors file"),
        (b"\x80\x02}q\x00.", "truncated or no safetensors file"),
    ],
)
def test_headers_that_are_bombs_are_refused(data, sentence, tmp_path: Path):
    write_saelens(tmp_path, V6, four())
    (tmp_path / "sae_weights.safetensors").write_bytes(data)
    refused(tmp_path, sentence)


def test_a_header_that_points_outside_its_file_is_refused(tmp_path: Path):
    write_saelens(tmp_path, V6, four())
    table = {"W_enc": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 1]}}
    header = json.dumps(table).encode()
    (tmp_path / "sae_weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(tmp_path, "truncated or no safetensors file")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"d_in": ' + "9" * 100_000 + "}", "not readable as JSON"),
        ("[]", "does not hold the settings of an SAE"),
        ("\ud800", "not readable as JSON"),
        ('{"metadata": {"sae_lens_version": {"a": 1}}}', "in the layout of SAELens {'a': 1}"),
        ('{"metadata": null}', "does not hold the settings"),
    ],
)
def test_settings_that_are_bombs_are_refused(text, sentence, tmp_path: Path):
    write_saelens(tmp_path, V6, four())
    (tmp_path / "cfg.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(tmp_path, sentence)


@pytest.mark.parametrize("hook", ["two\nlines", "\x1b[31mred", "half \ud800"])
def test_text_that_cannot_be_printed_is_refused(hook, tmp_path: Path):
    refused(
        write_saelens(tmp_path, V6 | {"metadata": V6["metadata"] | {"hook_name": hook}}, four()), "must be text|JSON"
    )


def test_numbers_that_are_none_are_read_as_unknown_and_can_be_written_again(tmp_path: Path):
    write_saelens(tmp_path, V6 | {"metadata": V6["metadata"] | {"l0": float("nan"), "mse": 1.5, "sum": "HUGE"}}, four())
    text = (tmp_path / "cfg.json").read_text()
    (tmp_path / "cfg.json").write_text(text.replace('"HUGE"', "1e999"))
    sae = load_sae(tmp_path)
    assert sae.metadata.extra == {"l0": None, "mse": 1.5, "sum": None}
    save_sae(sae, tmp_path / "again")
    assert load_sae(tmp_path / "again").metadata == sae.metadata


def test_settings_of_a_gigabyte_are_not_read(tmp_path: Path):
    write_saelens(tmp_path, V6, four())
    with (tmp_path / "cfg.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # a hole, not bytes
    refused(tmp_path, "bytes, which no settings file of an SAE needs")


def test_links_out_of_a_folder_are_refused_but_not_those_of_the_hub(tmp_path: Path):
    secret = write_saelens(tmp_path / "elsewhere", V6, four())
    inside = tmp_path / "shared"
    inside.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (inside / name).symlink_to(secret / name)
    refused(inside, r"is a link to .*elsewhere.*, outside its folder")

    hub = tmp_path / "models--owner--name"
    snapshot = hub / "snapshots" / "0123abcd" / "layer_3"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for i, name in enumerate(("cfg.json", "sae_weights.safetensors")):
        (hub / "blobs" / str(i)).write_bytes((secret / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../../blobs") / str(i))
    assert load_sae(snapshot).d_sae == D_SAE
    (tmp_path / "linked").symlink_to(secret)  # a linked folder is the user's own choice
    assert load_sae(tmp_path / "linked").d_sae == D_SAE


def test_pipes_folders_and_loops_in_the_place_of_files_are_refused(tmp_path: Path):
    write_saelens(tmp_path / "pipe", V6, four())
    weights = tmp_path / "pipe" / "sae_weights.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # reading it would wait for ever
    refused(tmp_path / "pipe", "is no regular file")
    weights.unlink()
    weights.mkdir()
    refused(tmp_path / "pipe", "is no regular file")
    settings = tmp_path / "pipe" / "cfg.json"
    settings.unlink()
    settings.symlink_to("cfg.json")
    refused(tmp_path / "pipe", "cfg.json")


@pytest.mark.parametrize("path", ["no/such/place", "x\0y", "a" * 5000, ""])
def test_paths_that_are_no_paths_are_refused(path, tmp_path: Path):
    with pytest.raises(SaelabError):
        load_sae(tmp_path / path)


BUILDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "saelens-weights": (lambda path: write_saelens(path, V6, four()), "sae_weights.safetensors"),
    "saelens-settings": (lambda path: save_sae(make("topk"), path), "cfg.json"),
    "saelens-legacy": (
        lambda path: write_saelens(
            path, {"d_in": D_IN, "d_sae": D_SAE, "activation_fn": "topk", "activation_fn_kwargs": {"k": 5}}, four()
        ),
        "cfg.json",
    ),
    "sparsify-settings": (lambda path: save_sae_as(make("groupmax"), path, format="sparsify"), "cfg.json"),
    "dictionary_learning-weights": (lambda path: dictionary_learning(path), "ae.pt"),
    "dictionary_learning-settings": (
        lambda path: save_sae_as(make("matryoshka"), path, format="dictionary_learning"),
        "config.json",
    ),
    "gemma_scope-weights": (lambda path: save_sae_as(make("jumprelu"), path, format="gemma_scope"), "params.npz"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of each of BUILDS."""
    found = {}
    for name, (build, _) in BUILDS.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder)
        found[name] = {file.name: file.read_bytes() for file in folder.iterdir()}
    return found


def loads_or_says_why(files: dict[str, bytes]) -> bool:
    """Whether the SAE in these files loads and computes; what is neither an SAE nor one sentence fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        try:
            sae = load_sae(folder)
        except SaelabError as error:
            sentence = str(error)
        else:
            sae(torch.randn(3, sae.d_in))
            return True
    assert "\n" not in sentence
    assert len(sentence) < 700
    return False


every_build = pytest.mark.parametrize("build", BUILDS)
examples = settings(deadline=None, suppress_health_check=list(HealthCheck))


@every_build
@settings(examples, max_examples=50)
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_no_changed_byte_gives_more_than_a_sentence(build, position, flip, built):
    file, data = BUILDS[build][1], bytearray(built[build][BUILDS[build][1]])
    data[int(position * len(data))] ^= flip
    loads_or_says_why(built[build] | {file: bytes(data)})


@every_build
@settings(examples, max_examples=15)
@given(share=st.floats(0, 1, exclude_max=True))
def test_no_truncation_gives_more_than_a_sentence(build, share, built):
    file, data = BUILDS[build][1], built[build][BUILDS[build][1]].rstrip()
    assert not loads_or_says_why(built[build] | {file: data[: int(share * len(data))]})


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = SIMPLE | st.lists(SIMPLE, max_size=3) | st.dictionaries(st.text(max_size=3), SIMPLE, max_size=3)


def places(content: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every setting, at whatever depth: its table and its name there."""
    here = [(content, name) for name in content]
    return here + [place for value in content.values() if isinstance(value, dict) for place in places(value)]


@pytest.mark.parametrize("build", [name for name in BUILDS if BUILDS[name][1].endswith("json")])
@settings(examples, max_examples=80)
@given(place=st.integers(0, 10**4), value=VALUES)
def test_no_value_of_a_setting_gives_more_than_a_sentence(build, place, value, built):
    file = BUILDS[build][1]
    content = json.loads(built[build][file])
    table, name = places(content)[place % len(places(content))]
    table[name] = value
    loads_or_says_why(built[build] | {file: json.dumps(content).encode()})


def test_weights_that_are_no_numbers_are_refused_in_every_format(tmp_path: Path):
    for value in (float("nan"), float("inf"), -float("inf")):
        state = dictionary_learning_state()
        state["decoder.weight"][1, 2] = value
        refused(dictionary_learning(tmp_path / "d", state), "decoder.weight that is not finite")
        tensors = four() | {"threshold": torch.ones(D_SAE)}
        tensors["W_dec"][1, 2] = value
        refused(write_npz(tmp_path / "g", tensors), "W_dec that is not finite")
        refused(write_saelens(tmp_path / "s", V6, {n: t for n, t in tensors.items() if n != "threshold"}), "not finite")


def test_an_sae_that_would_not_be_finite_is_not_written(tmp_path: Path):
    sae = make("relu")
    with torch.no_grad():
        sae.encoder[0, 0] = float("nan")
    for form in ("saelens", "dictionary_learning", "gemma_scope"):
        with pytest.raises(ArtifactError, match="not finite, so it is not saved"):
            save_sae_as(sae, tmp_path / form, format=form)
        assert not (tmp_path / form).exists()


def test_integers_in_the_place_of_weights_are_refused(tmp_path: Path):
    write_saelens(tmp_path, V6, four())
    tensors = {name: tensor.to(torch.int64) for name, tensor in four().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "sae_weights.safetensors")
    refused(tmp_path, "as torch.int64, but weights are floating-point")
