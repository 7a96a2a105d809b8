"""Models found as files and in a repository, and what is said when they are not."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from inferbus.models.base import InvalidModel, Signature, TensorSpec
from inferbus.models.onnx import OnnxExecutor
from inferbus.models.python import PythonExecutor
from inferbus.models.repository import executors, locate
from tests import tiny_models


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """`digits` in versions 2, 9 and 10 and `fraud` in version 1."""
    root = tmp_path / "model-repository"
    for version in ("2", "9", "10"):
        folder = root / "digits" / version
        folder.mkdir(parents=True)
        tiny_models.linear(folder / "model.onnx", seed=int(version))
    tiny_models.python_model(root / "fraud" / "1")
    return root


def refused(model: str | Mapping[str, object], repository: Path | None = None) -> str:
    with pytest.raises(InvalidModel) as caught:
        locate(model, repository)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPlainFiles:
    def test_the_name_is_the_stem_and_the_version_the_hash(self, tmp_path: Path) -> None:
        path = tiny_models.linear(tmp_path / "digits.onnx")
        artefact = locate(str(path))
        assert artefact.name == "digits"
        assert artefact.version == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        assert (artefact.path, artefact.executor) == (path.resolve(), "onnxruntime")

    def test_a_relative_path_starts_at_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tiny_models.linear(tmp_path / "digits.onnx")
        monkeypatch.chdir(tmp_path)
        assert locate("digits.onnx").path == locate("./digits.onnx").path == path.resolve()

    def test_a_mapping_may_name_the_path_and_other_settings(self, tmp_path: Path) -> None:
        path = tiny_models.linear(tmp_path / "digits.onnx")
        artefact = locate({"path": path, "name": None, "device": "cpu", "executor": "onnxruntime"})
        assert artefact == locate({"path": str(path)})

    def test_a_python_model_has_its_signature_beside_it(self, tmp_path: Path) -> None:
        artefact = locate(str(tiny_models.python_model(tmp_path)))
        assert (artefact.name, artefact.executor) == ("model", "python")
        assert artefact.settings.signature == Signature(
            (TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1, 3)),)
        )

    def test_another_models_yaml_is_not_read(self, tmp_path: Path) -> None:
        tiny_models.python_model(tmp_path)
        artefact = locate(str(tiny_models.linear(tmp_path / "digits.onnx")))
        assert artefact.settings.inputs == ()

    def test_a_misspelt_file_is_refused_with_the_nearest(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny_models.linear(tmp_path / "digits.onnx")
        monkeypatch.chdir(tmp_path)
        assert refused("digts.onnx") == "model: no file 'digts.onnx'; did you mean 'digits.onnx'?"

    def test_a_missing_file_is_refused_with_what_there_is(self, tmp_path: Path) -> None:
        tiny_models.linear(tmp_path / "digits.onnx")
        tiny_models.linear(tmp_path / "faces.onnx")
        assert refused(f"{tmp_path}/zzz.py").endswith("zzz.py'; there is digits.onnx, faces.onnx")
        assert refused(f"{tmp_path}/nowhere/zzz.py").endswith("zzz.py'; there is no model file at all")

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        assert refused(f"{tmp_path}/").endswith("is a folder; give the file in it")

    def test_a_pipe_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "m.onnx")
        assert refused(str(tmp_path / "m.onnx")) == "model: m.onnx is not a regular file"

    def test_a_file_of_no_known_kind_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "m.pkl").touch()
        assert refused(str(tmp_path / "m.pkl")) == "model: m.pkl: expected a file that ends in .onnx or .py"

    @pytest.mark.parametrize("suffix", [".pt2", ".pt", ".safetensors"])
    def test_torch_files_are_not_available_yet(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"m{suffix}").touch()
        assert refused(str(tmp_path / f"m{suffix}")).endswith("torch models are not available yet")


class TestNames:
    def test_a_bare_name_is_the_highest_version_by_number(self, repository: Path) -> None:
        artefact = locate("digits", repository)
        assert (artefact.name, artefact.version) == ("digits", "10")
        assert artefact.path == (repository / "digits/10/model.onnx").resolve()

    def test_a_bare_name_is_the_alias_live_where_there_is_one(self, repository: Path) -> None:
        (repository / "digits/aliases.yaml").write_text("live: 9\ncandidate: '10'\n")
        assert locate("digits", repository).version == "9"
        assert locate("digits@live", repository).version == "9"
        assert locate("digits@candidate", repository).version == "10"
        assert locate({"name": "digits@2"}, repository).version == "2"

    def test_versions_that_are_no_numbers_are_in_natural_order(self, repository: Path) -> None:
        for version in ("v1.9", "v1.10", "v1.2-rc1"):
            (repository / "fraud" / version).mkdir()
            tiny_models.linear(repository / "fraud" / version / "model.onnx")
        assert locate("fraud", repository).version == "v1.10"

    def test_an_alias_keeps_the_text_of_a_version_that_looks_like_a_number(self, repository: Path) -> None:
        (repository / "digits/10").rename(repository / "digits/1.10")
        (repository / "digits/aliases.yaml").write_text("live: 1.10\n")
        assert locate("digits", repository).version == "1.10"

    def test_a_name_without_a_repository_is_refused(self) -> None:
        assert refused("digits").startswith("model: 'digits' is a name and no `repository` is set")

    def test_a_missing_repository_is_refused(self) -> None:
        assert refused("digits", Path("nowhere")) == "repository: no folder 'nowhere'"

    def test_a_misspelt_name_is_refused_with_the_nearest(
        self, repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(repository.parent)
        line = refused("digit", Path("model-repository"))
        assert line == "model: no 'digit' in 'model-repository'; did you mean 'digits'?"

    def test_a_missing_version_is_refused_with_what_there_is(self, repository: Path) -> None:
        line = refused("digits@3", repository)
        assert "no version '3' of 'digits'" in line
        assert line.endswith("there is 2, 9, 10")

    def test_an_alias_that_leads_nowhere_is_refused_by_its_name(self, repository: Path) -> None:
        (repository / "digits/aliases.yaml").write_text("live: 7\n")
        assert "no version '7' (alias 'live') of 'digits'" in refused("digits", repository)

    def test_a_misspelt_alias_is_refused_with_the_nearest(self, repository: Path) -> None:
        (repository / "digits/aliases.yaml").write_text("candidate: 10\n")
        assert refused("digits@canditate", repository).endswith("did you mean 'candidate'?")

    def test_a_model_without_versions_is_refused(self, repository: Path) -> None:
        (repository / "empty" / ".hidden").mkdir(parents=True)
        assert refused("empty", repository).endswith("has no versions")

    @pytest.mark.parametrize(
        "name", ["a..b", "..", ".", ".git", "a b", "a@", "@1", "a@..", "a@b@c", "dig its", "a@b\n"]
    )
    def test_names_that_are_no_names_are_refused(self, repository: Path, name: str) -> None:
        assert "names and versions are letters, digits" in refused({"name": name}, repository)

    @pytest.mark.parametrize("model", [{}, {"path": "a.onnx", "name": "a"}, {"path": ""}, {"name": 3}, ""])
    def test_neither_or_both_of_path_and_name_are_refused(self, model: str | Mapping[str, object]) -> None:
        assert refused(model).startswith("model: ")


class TestVersionFolders:
    def test_two_artefacts_are_refused(self, repository: Path) -> None:
        tiny_models.python_model(repository / "digits/10")
        assert refused("digits", repository).endswith("holds both model.onnx and model.py: keep one")

    def test_none_is_refused(self, repository: Path) -> None:
        (repository / "digits/10/model.onnx").rename(repository / "digits/10/digits.onnx")
        assert refused("digits", repository).endswith("holds neither model.onnx nor model.py")

    def test_weights_with_their_module_are_one_artefact_not_available_yet(self, repository: Path) -> None:
        (repository / "fraud/1/model.safetensors").touch()
        assert refused("fraud", repository).endswith("torch models are not available yet")

    @pytest.mark.parametrize("linked", ["digits", "digits/10", "digits/10/model.onnx", "digits/10/model.yaml"])
    def test_a_link_out_of_the_repository_is_refused(self, repository: Path, linked: str) -> None:
        (repository / "digits/10/model.yaml").touch()
        inside, outside = repository / linked, repository.parent / "outside"
        inside.rename(outside)
        inside.symlink_to(outside)
        assert refused("digits", repository).endswith("is a link that leaves the repository")

    def test_aliases_out_of_the_repository_are_refused(self, repository: Path) -> None:
        (repository.parent / "aliases").write_text("live: 2")
        (repository / "digits/aliases.yaml").symlink_to(repository.parent / "aliases")
        assert refused("digits", repository).endswith("is a link that leaves the repository")

    def test_a_link_within_the_repository_is_followed(self, repository: Path) -> None:
        (repository / "digits/latest").symlink_to("9")
        assert locate("digits@latest", repository).path == (repository / "digits/9/model.onnx").resolve()

    def test_a_repository_that_is_itself_a_link_is_followed(self, repository: Path) -> None:
        (repository.parent / "link").symlink_to(repository)
        assert locate("digits", repository.parent / "link").version == "10"


class TestModelYaml:
    @pytest.fixture
    def yaml(self, repository: Path) -> Path:
        return repository / "digits/10/model.yaml"

    def test_everything_it_may_say_is_read(self, repository: Path, yaml: Path) -> None:
        yaml.write_text(
            "inputs: [{name: x, datatype: FP32, shape: [-1, 64]}]\n"
            "executor: onnxruntime\nbatch: {max_rows: 32, max_delay: 5ms}\nwarmup: {x: [64]}\n"
        )
        settings = locate("digits", repository).settings
        assert settings.signature.inputs == (TensorSpec("x", "FP32", (-1, 64)),)
        assert settings.batch == {"max_rows": 32, "max_delay": "5ms"}
        assert settings.warmup == {"x": (64,)}

    def test_the_right_hash_is_accepted_in_any_case(self, repository: Path, yaml: Path) -> None:
        digest = hashlib.sha256(yaml.with_name("model.onnx").read_bytes()).hexdigest()
        yaml.write_text(f"sha256: {digest.upper()}\n")
        assert locate("digits", repository).version == "10"

    def test_another_files_hash_is_refused(self, repository: Path, yaml: Path) -> None:
        digest = hashlib.sha256(yaml.with_name("model.onnx").read_bytes()).hexdigest()
        yaml.write_text(f"sha256: {'f' * 64}\n")
        assert refused("digits", repository) == f"model.yaml: sha256: model.onnx has {digest}"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("input: []", "10/model.yaml: input: unknown; did you mean 'inputs'?"),
            ("inputs: [{nme: x}]", "10/model.yaml: inputs.0.name: Field required"),
            (
                "inputs: [{name: x, datatype: FP32, shape: [-1], dtype: 1}]",
                "unknown; did you mean 'datatype'?",
            ),
            ("inputs: [{name: x, datatype: float, shape: [-1]}]", "datatype: expected one of BOOL"),
            ("inputs: [{name: x, datatype: FP32, shape: [1, 3]}]", "shape: expected -1 for the batch"),
            ("inputs: [{name: x, datatype: FP32, shape: [-1, 0]}]", "shape: expected -1 for the batch"),
            ("sha256: abc", "10/model.yaml: sha256: String should match pattern"),
            ("buckets: [1, 8]", "10/model.yaml: buckets: not available yet"),
            ("golden: {inputs: {}}", "10/model.yaml: golden: not available yet"),
            ("executor: python", "executor: 'python' does not run model.onnx; onnxruntime does"),
            ("executor: neuron", "model: model.onnx: neuron models are not available yet"),
            ("executor: [", "10/model.yaml line 2: expected the node content"),
            ("just words", "10/model.yaml: expected `key: value` lines"),
        ],
    )
    def test_what_is_wrong_in_it_is_refused_by_name(self, repository: Path, yaml: Path, text: str, reason: str) -> None:
        yaml.write_text(text + "\n")
        assert reason in refused("digits", repository)

    def test_bytes_that_are_no_text_are_refused(self, repository: Path, yaml: Path) -> None:
        yaml.write_bytes(b"\xff\xfe\x00")
        assert refused("digits", repository).startswith("10/model.yaml: cannot be read")

    def test_yaml_builds_no_objects(self, repository: Path, yaml: Path) -> None:
        yaml.write_text("executor: !!python/object/apply:os.getcwd []\n")
        assert "could not determine a constructor" in refused("digits", repository)

    @pytest.mark.parametrize("text", ["live: [1]", "live: {a: b}", "- live"])
    def test_aliases_of_another_shape_are_refused(self, repository: Path, text: str) -> None:
        (repository / "digits/aliases.yaml").write_text(text)
        assert refused("digits", repository).startswith("digits/aliases.yaml: expected")


class TestExecutors:
    def test_an_onnx_file_gets_as_many_sessions_as_replicas(self, repository: Path) -> None:
        made = executors(locate("digits@2", repository), replicas=2)
        assert [type(executor) for executor in made] == [OnnxExecutor, OnnxExecutor]
        assert {executor.info.version for executor in made} == {"2"}
        for executor in made:
            executor.load()
        row = {"x": np.zeros((1, 64), np.float32)}
        assert all(executor.predict(row)["label"].shape == (1,) for executor in made)

    def test_a_python_file_gets_instances_of_its_class(self, repository: Path) -> None:
        made = executors(locate("fraud", repository), device="cuda:1", replicas=3)
        assert [type(executor) for executor in made] == [PythonExecutor] * 3
        assert made[0].info.device == "cuda:1"

    def test_options_for_a_python_model_are_refused(self, repository: Path) -> None:
        with pytest.raises(InvalidModel, match=r"options\.spinning: the python executor has no options"):
            executors(locate("fraud", repository), options={"spinning": True})

    def test_options_reach_onnxruntime(self, repository: Path) -> None:
        with pytest.raises(InvalidModel, match=r"options\.spining: unknown"):
            executors(locate("digits", repository), options={"spining": True})

    def test_a_declared_signature_reaches_the_executor(self, repository: Path) -> None:
        text = "inputs: [{name: x, datatype: FP64, shape: [-1, 64]}]\n"
        (repository / "digits/10/model.yaml").write_text(text)
        executor = executors(locate("digits", repository))[0]
        with pytest.raises(InvalidModel, match=r"input 'x' is FP32 in the file and FP64 in model\.yaml"):
            executor.load()
