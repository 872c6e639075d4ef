"""The command line: light to start, streaming, a kept state, mistakes in one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from vlmamba import cli
from vlmamba.commands import load as loading
from vlmamba.commands.conversation import Conversation, _text
from vlmamba.inference import Sampling
from vlmamba.models.images import read_image

PATCHES = 9


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.linear_gradient("L").convert("RGB").resize((40, 30)).save(path)
    return str(path)


@pytest.fixture(scope="session")
def loaded(tiny_model):
    return loading.load(str(tiny_model), "cpu")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


# ---------------------------------------------------------------------- starting


def test_help_is_light():
    script = (
        "import sys, vlmamba.cli as cli\n"
        "cli.parse(['ask', 'picture', 'question']); cli.parse([])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_help_is_quick():
    took = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "vlmamba.cli", "--help"], check=True, capture_output=True, text=True
        )
        after = os.times()  # processor time, so that a busy machine does not count
        took.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert all(
        name in done.stdout for name in ("ask", "chat", "serve", "train", "data", "eval", "score", "info", "verify")
    )
    assert min(took) < 0.5


@pytest.mark.parametrize("question", ["yes", "null", "1", "{a: 1}", "[x]", "<image>", "a: b", "@file", "what?\n"])
def test_questions_stay_as_typed(question):
    assert cli.parse(["ask", "picture.png", question])[1]["question"] == question


def test_training_overrides_with_and_without_dashes():
    _, options = cli.parse(["train", "paper/stage1", "optim.lr=1e-3", "--stage.template=plain", "--output=runs/x"])
    assert options["words"] == ["paper/stage1", "optim.lr=1e-3", "stage.template=plain"]
    assert options["output"] == "runs/x"


# ---------------------------------------------------------------------- ask


def asking(picture: object, model: object, question: str = "What is this?") -> tuple[object, ...]:
    """Arguments of a short question."""
    return ("ask", picture, question, "--model", str(model), "--device", "cpu", "--max-new-tokens", "4")


def test_ask_answers(capsys, tiny_model, picture):
    arguments = asking(picture, tiny_model)
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert out.endswith("\n")
    assert run(capsys, *arguments)[1] == out


def test_int8_is_a_way_to_read_weights(capsys, tiny_model, picture):
    arguments = asking(picture, tiny_model)
    code, out, err = run(capsys, *arguments, "--dtype", "int8")
    assert (code, err) == (0, "")
    assert out.endswith("\n")
    code, _, err = run(capsys, *arguments, "--dtype", "int9")
    assert code == 2
    assert "expected auto, int8" in err


def test_a_literal_placeholder_in_a_question_is_text(capsys, tiny_model, picture):
    code, _, err = run(capsys, *asking(picture, tiny_model, "is <image> a tag?"))
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask"], "required: image, question (see vlmamba ask --help)"),
        (["ask", "PICTURE"], "required: question"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["ask", "PICTURE", "x", "--temprature", "1"], "--temprature"),
        (["ask", "PICTURE", "x", "--temperature", "warm"], "warm"),
        (["ask", "PICTURE", "x", "--temperature", "-1"], "temperature is -1.0; expected 0 to 100"),
        (["ask", "PICTURE", "x", "--max-new-tokens", "0"], "max_new_tokens is 0; expected a whole number of 1 or more"),
        (["ask", "/no/picture.png", "x"], "no such image: /no/picture.png"),
        (["ask", "TEXT", "x"], "notes.jpg is not an image"),
        (["ask", "PICTURE", "  "], "the question is empty"),
        (["ask", "PICTURE", "x", "--model", "nonsense"], "'nonsense' is neither a folder here nor a Hub id"),
        (["ask", "PICTURE", "x", "--model", "EMPTY"], "holds no config.json, so it is not a checkpoint"),
        (["ask", "PICTURE", "x", "--model", "TINY", "--device", "abacus"], "--device abacus is unknown"),
        (["ask", "PICTURE", "x", "--model", "TINY", "--device", "cuda:99"], "--device cuda:99 is not here"),
        (["ask", "PICTURE", "x", "--model", "TINY", "--dtype", "int3"], "--dtype int3 is unknown"),
        (["chat", "/no/picture.png"], "no such image"),
        (["train", "no/recipe.yaml"], "no/recipe.yaml"),
        (["train", "paper/stage1", "fast"], "'fast' is not an override"),
        (["train", "paper/stage1", "optim.nonsense=1"], "optim.nonsense"),
        (["verify", "EMPTY", "EMPTY"], "config.json"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, tiny_model, picture, arguments, words):
    (tmp_path / "notes.jpg").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    names = {"PICTURE": picture, "TINY": str(tiny_model), "TEXT": str(tmp_path / "notes.jpg")}
    names["EMPTY"] = str(tmp_path / "empty")
    code, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert code == 2
    assert words in err
    assert err.startswith("vlmamba: error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("VLMAMBA_DEBUG", "1")
    with pytest.raises(ValueError, match="no such image"):
        cli.main(["ask", "/no/picture.png", "x"])


def test_nano_that_is_not_installed_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "NANO", tmp_path)
    with pytest.raises(ValueError, match="nano model is not in this installation"):
        loading.find_model("nano")


def test_a_run_s_folder_stands_for_its_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "vlmamba"}')
    assert loading.find_model(str(tmp_path)) == loading.find_model(str(tmp_path / "model")) == tmp_path / "model"


# ---------------------------------------------------------------------- conversation


class Recorder:
    """The model, with what went in and what came out."""

    def __init__(self, loaded, monkeypatch):
        self.inputs: list[torch.Tensor] = []
        self.pixels: list[torch.Tensor] = []
        self.logits = None
        forward = loaded.model.forward

        def recorded(input_ids, pixel_values=None, **kwargs):
            self.inputs.append(input_ids)
            self.pixels += [] if pixel_values is None else [pixel_values]
            output = forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
            self.logits = output.logits[0, -1]
            return output

        monkeypatch.setattr(loaded.model, "forward", recorded)
        self.forward = forward


def test_turns_read_their_own_tokens_and_equal_re_reading(loaded, picture, monkeypatch):
    seen = Recorder(loaded, monkeypatch)
    talk = Conversation(loaded, Sampling(max_new_tokens=3))
    image = read_image(picture)
    first = "".join(talk.ask("What is this?", [image]))
    before = talk.tokens_read
    "".join(talk.ask("And now?"))
    second_turn = talk.tokens_read - before
    "".join(talk.ask("And this?", [image]))
    assert second_turn < 40 < before  # the picture and the system sentence are not read again
    assert isinstance(first, str)

    whole = torch.cat(seen.inputs, dim=1)
    assert whole.shape[1] == talk.tokens_read
    assert (whole == loaded.processor.image_token_id).sum() == 2 * PATCHES
    with torch.inference_mode():
        expected = seen.forward(input_ids=whole, pixel_values=torch.cat(seen.pixels)).logits[0, -1]
    torch.testing.assert_close(seen.logits, expected, rtol=1e-4, atol=1e-4)


def test_the_conversation_that_is_read_is_template_v1(loaded, picture, monkeypatch):
    seen = Recorder(loaded, monkeypatch)
    talk = Conversation(loaded, Sampling(max_new_tokens=2))
    "".join(talk.ask("One?", [read_image(picture)]))
    "".join(talk.ask("Two?"))
    text = loaded.processor.tokenizer.decode(torch.cat(seen.inputs, dim=1)[0])
    assert text.count("A chat between") == 1
    assert "USER: " + "<image>" * PATCHES + "\nOne? ASSISTANT:" in text
    assert "<|endoftext|>USER: Two? ASSISTANT:" in text


def test_an_interrupted_answer_is_closed_before_the_next_question(loaded, monkeypatch):
    seen = Recorder(loaded, monkeypatch)
    talk = Conversation(loaded, Sampling(max_new_tokens=50))
    answer = talk._generate(torch.tensor([[5, 6, 7]]), None)
    token = next(answer)
    answer.close()
    "".join(talk.ask("Next?"))
    assert seen.inputs[1][0, :2].tolist() == [token, loaded.processor.tokenizer.eos_token_id]


def test_reset_forgets(loaded):
    talk = Conversation(loaded, Sampling(max_new_tokens=3))
    first = "".join(talk.ask("hi"))
    "".join(talk.ask("more"))
    talk.reset()
    assert talk.tokens_read == 0
    assert "".join(talk.ask("hi")) == first


def test_sampling_follows_the_seed(loaded):
    def answer(seed: int) -> str:
        return "".join(Conversation(loaded, Sampling(max_new_tokens=12, temperature=5.0, seed=seed)).ask("hi"))

    assert answer(1) == answer(1) != answer(2)


def test_the_lowest_temperature_takes_the_likeliest_word(loaded):
    sampled = Conversation(loaded, Sampling(4, temperature=1e-45))
    assert list(sampled.ask("What is this?")) == list(Conversation(loaded, Sampling(4)).ask("What is this?"))


def test_bytes_that_are_no_text_are_read_as_question_marks(loaded):
    broken = list(Conversation(loaded, Sampling(4)).ask("What \udcff is this?"))
    assert broken == list(Conversation(loaded, Sampling(4)).ask("What ? is this?"))


def test_text_streams_whole_characters(tokenizer):
    tokens = tokenizer(" Grüße 🙂 yes")["input_ids"]
    pieces = list(_text(tokenizer, iter(tokens)))
    assert "".join(pieces) == "Grüße 🙂 yes"
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_chat_commands(capsys, monkeypatch, tiny_model, picture):
    lines = f"hi\n/image {picture}\nwhat?\n/image /no/such.png\n/image\n/dance\n\n/reset\nhi\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = run(capsys, "chat", "--model", str(tiny_model), "--device", "cpu", "--max-new-tokens", "2")
    assert code == 0
    answers = out.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2]
    assert "no such image: /no/such.png" in err
    assert "unknown command /dance" in err
    assert "unknown command /image. " in err
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = run(capsys, "chat", "--model", str(tiny_model))
    assert (code, "standard input, which is closed" in err) == (2, True)


# ---------------------------------------------------------------------- info and verify


def test_info_reports(capsys):
    code, out, _ = run(capsys, "info")
    assert code in (0, 1)
    for word in ("torch", "devices", "cpu:", "selective_scan", "scan_2d", "problems", "nano model"):
        assert word in out


def test_info_tells_settings_from_faults(capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "torch uses 1 of 4 CPUs" in out
    monkeypatch.setenv("VLMAMBA_OPS", "nonsense")
    code, out, _ = run(capsys, "info")
    assert code == 1
    assert "unset VLMAMBA_OPS" in out


def test_info_names_an_old_torch_and_a_misfit_torchvision(monkeypatch):
    from vlmamba.commands import info

    versions = {"torch": "2.4.1+cpu", "transformers": "6.0.1"}
    monkeypatch.setattr(info, "installed", versions.get)
    monkeypatch.setattr(info, "_torchvision_trouble", lambda: "operator torchvision::nms does not exist")
    found = "\n".join(problem for problem, _ in info.problems())
    assert "torch 2.4.1+cpu is older than 2.11" in found
    assert "transformers 6 is not supported" in found
    assert "torchvision does not fit" in found


@pytest.fixture(scope="session")
def parts(tmp_path_factory, tokenizer_json):
    """A Mamba and a SigLIP with random weights, as transformers saves them."""
    from tokenizers import Tokenizer
    from transformers import (
        MambaConfig,
        MambaForCausalLM,
        PreTrainedTokenizerFast,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=320)).save_pretrained(folder / "mamba")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json), eos_token="<|endoftext|>"
    ).save_pretrained(folder / "mamba")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(image_size=24, patch_size=8, **sizes)).save_pretrained(folder / "siglip")
    return folder


def test_verify_agrees(capsys, parts, picture):
    code, out, _ = run(capsys, "verify", str(parts / "mamba"), str(parts / "siglip"), "--image", picture)
    assert code == 0
    assert out.count("same  ") == 3
    assert "from_parts" in out


def test_verify_sees_a_difference(capsys, monkeypatch, parts):
    from vlmamba.commands import verify

    load_vision = verify.load_vision

    def spoilt(source):
        tower = load_vision(source)
        torch.nn.init.normal_(tower.model.encoder.layers[0].mlp.fc1.weight)
        return tower

    monkeypatch.setattr(verify, "load_vision", spoilt)
    code, out, _ = run(capsys, "verify", str(parts / "mamba"), str(parts / "siglip"))
    assert code == 1
    assert "DIFFERENT  9 patches" in out
    assert "what to do: the vision encoder differs" in out


def test_verify_names_a_missing_tensor(capsys, parts, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(parts / "mamba", broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["backbone.layers.1.mixer.D"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(capsys, "verify", str(broken), str(parts / "siglip"))
    assert code == 2
    assert "missing" in err
    assert "layers.1.mixer" in err


# ---------------------------------------------------------------------- eval and score


@pytest.fixture
def own_questions(tmp_path, picture) -> str:
    questions = [
        {
            "id": str(number),
            "image": picture,
            "conversations": [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "a fork"}],
        }
        for number, text in enumerate(["What is it?", "And what is that in the corner?", "Why?"])
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(questions))
    return str(path)


@pytest.mark.parametrize("other", [("--tasks", "pope"), ("--data", "benchmarks")])
def test_own_questions_are_a_task_by_themselves(capsys, own_questions, other):
    code, _, err = run(capsys, "eval", "nano", "--own", own_questions, *other)
    assert code == 2
    assert "--own FILE" in err


def test_eval_of_own_questions_then_score(capsys, tiny_model, own_questions, tmp_path):
    out = tmp_path / "out"
    common = ("--own", own_questions, "--out", str(out), "--device", "cpu", "--metric", "contains", "--batch-size", "2")
    code, table, _ = run(capsys, "eval", str(tiny_model), *common)
    assert code == 0
    assert "own data" in table
    result = json.loads((out / "own" / "result.json").read_text())
    assert len(result["answers"]) == 3
    assert result["run"]["decoding"] == "greedy"
    answers = next((out / "own").glob("answers-*.jsonl"))
    for line in answers.read_text().splitlines():
        record = json.loads(line)
        record["text"] = "it is a fork" if record["id"] != "2" else "no idea"
        (tmp_path / "edited.jsonl").open("a").write(json.dumps(record) + "\n")
    arguments = ("score", "own", "--data", own_questions, "--predictions", str(tmp_path / "edited.jsonl"))
    code, text, _ = run(capsys, *arguments, "--metric", "contains", "--json", str(tmp_path / "result.json"))
    assert code == 0
    assert "66.67" in text
    assert (tmp_path / "result.json").is_file()
    page = tmp_path / "page.html"
    code, _, _ = run(capsys, "report", str(out), "--output", str(page), "--compare", str(tmp_path / "result.json"))
    assert code == 0
    assert page.read_text().lower().startswith("<!doctype html")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval"], "--data FOLDER is needed"),
        (["eval", "--data", "EMPTY", "--tasks", "chess"], "chess"),
        (["eval", "--data", "EMPTY", "--prompts", "textvqa"], "TASK=VARIANT"),
        (["eval", "--data", "EMPTY", "--own", "x.json"], "one of them"),
        (["eval", "--data", "EMPTY", "--judge-model", "x"], "--judge-url"),
        (["score", "pope", "--data", "EMPTY", "--predictions", "x"], "no POPE folder"),
        (["score", "pope", "--data", "EMPTY", "--predictions", "x", "--rule", "1999"], "--rule 1999"),
    ],
)
def test_evaluation_mistakes_are_one_line(capsys, tmp_path, arguments, words):
    code, _, err = run(capsys, *(str(tmp_path) if argument == "EMPTY" else argument for argument in arguments))
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("extra", [["--judge-runs", "0"], ["--judge-price", "3"]])
def test_judge_options_that_make_no_sense(capsys, tmp_path, extra):
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "x"]
    code, _, err = run(capsys, "score", "mmvet", "--data", str(tmp_path), "--predictions", "x", *judge, *extra)
    assert code == 2
    assert extra[0] in err


def test_eval_keeps_the_judge_s_replies_beside_the_answers(monkeypatch, tmp_path, tiny_model):
    from vlmamba.commands import evaluate as command
    from vlmamba.evaluation import api

    seen = {}
    monkeypatch.setattr(command, "answerer_of", lambda *_: None)
    monkeypatch.setattr("vlmamba.commands.load.load", lambda *_: None)
    monkeypatch.setattr(api, "evaluate", lambda *_, **options: seen.update(options) or [])
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "x", "--judge-price", "2.5,10"]
    assert cli.main(["eval", str(tiny_model), "--data", str(tmp_path), "--out", str(tmp_path / "out"), *judge]) == 0
    assert seen["options"].judge.cache == tmp_path / "out" / "judge.jsonl"
    assert "about $0.01 " in seen["options"].judge.estimate(["x" * 8000], 100)


def test_eval_s_second_process_needs_no_gpu(capsys, monkeypatch, tmp_path, tiny_model):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "own.json").write_text(json.dumps([{"id": i, "conversations": turns} for i in (1, 2)]))
    out = tmp_path / "out"
    assert run(capsys, "eval", str(tiny_model), "--own", str(tmp_path / "own.json"), "--out", str(out))[0] == 0
    assert (out / "own" / "answers-1-of-2.jsonl").read_text().count("\n") == 1


def test_eval_check_says_what_is_missing(capsys, tmp_path):
    code, out, _ = run(capsys, "eval", "--check", str(tmp_path), "--tasks", "pope,gqa")
    assert code == 1
    assert "coco_pope_random.json is missing" in out


# ---------------------------------------------------------------------- train and data


def test_train_runs_a_recipe_into_runs(capsys, monkeypatch, tmp_path, tiny_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        f"model: {{path: {tiny_model}}}\n"
        "data: [{scenes: {what: conversation}, size: 8}]\n"
        "stage: {template: v1, connector: {lr: 1.0e-3}}\n"
        "optim: {global_batch: 2, micro_batch: 2, bf16: false}\n"
        "workers: 0\ndevice: cpu\n"
    )
    code, _, err = run(capsys, "train", "small.yaml", "optim.max_steps=1", "--logging.tensorboard=false")
    assert code == 0
    assert "loss" in err
    assert (tmp_path / "runs" / "small" / "model" / "config.json").is_file()
    code, out, _ = run(capsys, "train", "small.yaml", "optim.max_steps=1", "--logging.tensorboard=false")
    assert code == 0
    assert "finished already" in out


def test_data_scenes_writes_a_set_once(capsys, tmp_path):
    arguments = ("data", "scenes", str(tmp_path / "set"), "--kind", "llava-stage1", "--count", "2", "--size", "64")
    code, out, _ = run(capsys, *arguments)
    assert (code, out.strip()) == (0, str(tmp_path / "set"))
    assert list((tmp_path / "set").rglob("*.json"))
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "is there already" in err


def test_data_scenes_names_an_unknown_kind(capsys, tmp_path):
    code, _, err = run(capsys, "data", "scenes", str(tmp_path / "set"), "--kind", "riddles")
    assert code == 2
    assert "unknown kind 'riddles'" in err
    assert not (tmp_path / "set").exists()
