"""The study: its runs, what tuning chooses, what the tables say, and one study of tiny runs from end to end."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import study as runner_module  # noqa: E402
import study_report  # noqa: E402
from study_plan import STAGES, Study, Unfinished, load_records, pack, unpack  # noqa: E402

CONFIG = {
    "settings": {"env": "toybox", "env_options": {"train": 8, "validation": 4, "test": 4}, "max_steps": 2},
    "warm_start": {"seed": 0, "settings": {"warm_start_steps": 2}},
    "seeds": {"tuning": [9], "arms": [0, 1], "ablations": [0]},
    "tuning": {"learning_rate": [1e-4, 2e-4], "sft_coef": [0.3, 1.0]},
    "evaluation": {"arms": {"test": {"split": "test", "tasks": 4}}},
    "ablated": "pact",
    "arms": {
        "sft": {"label": "SFT", "tune": ["learning_rate"], "settings": {"num_rollouts": 0}},
        "both": {
            "label": "SFT, then RL",
            "tune": [],
            "from_arm": {"warm_start_lr": ["sft", "learning_rate"], "learning_rate": ["pact", "learning_rate"]},
            "settings": {"num_rollouts": 2, "warm_start_steps": 1},
        },
        "pact": {"label": "PACT", "tune": ["learning_rate", "sft_coef"], "settings": {"num_rollouts": 2}},
    },
    "ablations": {"no_anchor": {"label": "q = 0", "settings": {"anchor_q": 0.0}}},
}


def done(jobs, score):
    """Records of ``jobs`` whose last two validation points have the mean ``score(job)``."""
    records = {}
    for job in jobs:
        mean = score(job)
        records[job.key] = {"key": job.key, "curve": {"validation": [0.9, mean - 0.01, mean + 0.01]}}
    return records


def test_stages_wait_for_what_tuning_chooses():
    study, records = Study(CONFIG), {}
    for stage in ("arms", "ablations", "sft_coef"):
        with pytest.raises(Unfinished):
            study.jobs(stage, records)
    records |= done(
        study.jobs("learning_rate", records), lambda job: {1e-4: 0.2, 2e-4: 0.3}[job.values["learning_rate"]]
    )
    coefs = study.jobs("sft_coef", records)
    assert [(job.arm, dict(job.values)) for job in coefs] == [
        ("pact", {"learning_rate": 2e-4, "sft_coef": 0.3}),
        ("pact", {"learning_rate": 2e-4, "sft_coef": 1.0}),
    ]
    records |= done(coefs, lambda job: 0.25)  # equal: the smaller value
    assert study.chosen("pact", records) == {"learning_rate": 2e-4, "sft_coef": 0.3}
    arms = study.jobs("arms", records)
    assert [(job.arm, job.seed) for job in arms] == [(arm, seed) for arm in ("sft", "both", "pact") for seed in (0, 1)]
    assert dict(arms[2].values) == {"warm_start_lr": 2e-4, "learning_rate": 2e-4}
    assert all(job.start == study.warm_start().key for job in arms)
    [ablation] = study.jobs("ablations", records)
    assert ablation.settings == {**arms[4].settings, "anchor_q": 0.0}
    assert len({job.key for job in [*coefs, *arms, ablation]}) == 9


def test_a_lucky_seed_does_not_choose_the_learning_rate():
    """The best rates with the first seed are tried with the others; the sum decides. Rates: lucky, steady, bad."""
    tuning = {"learning_rate": [1e-4, 2e-4, 5e-4], "sft_coef": [0.3, 1.0]}
    config = {**CONFIG, "seeds": {**CONFIG["seeds"], "tuning": [9, 10]}, "tuning": tuning}
    config["arms"] = {"pact": {**CONFIG["arms"]["pact"], "settings": {"sft_coef": 1.0}}}
    of_rate = {1e-4: {9: 0.1, 10: 0.9}, 2e-4: {9: 0.3, 10: 0.3}, 5e-4: {9: 0.4, 10: 0.1}}
    study = Study(config)
    tried = study.jobs("learning_rate", {})
    assert [job.seed for job in tried] == [9, 9, 9]
    records = done(tried, lambda job: of_rate[job.values["learning_rate"]][9])
    with pytest.raises(Unfinished):
        study.jobs("sft_coef", records)
    second = [job for job in study.jobs("learning_rate", records) if job.key not in records]
    assert [(job.values["learning_rate"], job.seed) for job in second] == [(2e-4, 10), (5e-4, 10)]
    records |= done(second, lambda job: of_rate[job.values["learning_rate"]][10])
    coefs = study.jobs("sft_coef", records)  # 1.0 is what the arm had when its rate was tuned
    assert [(dict(job.values), job.seed) for job in coefs] == [({"learning_rate": 2e-4, "sft_coef": 0.3}, 9)]
    records |= done(coefs, lambda job: 0.31)
    [more] = [job for job in study.jobs("sft_coef", records) if job.key not in records]
    assert more.seed == 10
    records |= done([more], lambda job: 0.2)
    assert study.chosen("pact", records) == {"learning_rate": 2e-4, "sft_coef": 1.0}
    assert "0.0002: **0.300** (2 seeds), 0.0005: 0.250 (2 seeds)" in study_report.tuning_table(study, records)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ablated": "ppo"}, "ppo is no arm: choose one of sft"),
        ({"tuning": {"sft_coef": [1.0]}}, "arm sft is tuned on"),
    ],
)
def test_a_study_that_cannot_be(change, says):
    with pytest.raises(ValueError, match=says):
        Study({**CONFIG, **change})


def test_the_key_is_of_what_decides_the_result():
    one, renamed = Study(CONFIG), Study(json.loads(json.dumps(CONFIG).replace("SFT, then RL", "both")))
    longer = Study({**CONFIG, "warm_start": {"seed": 0, "settings": {"warm_start_steps": 3}}})
    assert one.warm_start().key == renamed.warm_start().key != longer.warm_start().key
    [a, *_], [b, *_] = one.jobs("learning_rate", {}), longer.jobs("learning_rate", {})
    assert a.settings == b.settings
    assert a.key != b.key  # it begins with other weights


def test_hits_are_packed_whole():
    rng = np.random.default_rng(0)
    for count in (1, 7, 8, 9, 512):
        hits = rng.integers(0, 2, count).astype(float)
        assert (unpack(pack(hits), count) == hits).all()


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "arms.jsonl"
    path.write_text('{"key": "a"}\n{"key": \n')
    with pytest.raises(ValueError, match="line 2 is no record"):
        load_records([path])


def arm(name, hits):
    final = [{"test": {"hits": pack(np.array(of_seed)), "tasks": len(of_seed)}} for of_seed in hits]
    return study_report.Arm(name, name, [{"seed": i, "final": split} for i, split in enumerate(final)])


def test_intervals_cover_as_often_as_they_say():
    """Success 0.4 on average, varying between tasks: 95% intervals of 60 made-up arms cover 0.4 about 57 times."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        easy = rng.uniform(0.0, 0.8, 200)
        low, high = study_report.interval(
            study_report.bootstrap([(rng.uniform(size=(5, 200)) < easy).astype(float)], lambda mean: mean)
        )
        covered += low <= 0.4 <= high
    assert 51 <= covered <= 60


def test_pairing_sees_what_intervals_apart_do_not():
    """Two arms on the same tasks, one of them right a little more often on each: the hard tasks are hard for both."""
    rng = np.random.default_rng(2)
    easy = rng.integers(0, 2, 400).astype(float)  # half the tasks are always solved
    worse = np.tile(easy, (5, 1))
    better = np.maximum(worse, rng.uniform(size=(5, 400)) < 0.1)
    mean, low, _, p = study_report.difference(arm("a", better), arm("b", worse), "test")
    assert low > 0.02
    assert p < 0.001
    assert mean == pytest.approx(better.mean() - worse.mean())
    alone = study_report.interval(study_report.bootstrap([worse], lambda mean: mean))
    assert alone[1] > better.mean()  # the unpaired interval of the worse arm holds the better one's mean
    same = study_report.difference(arm("a", worse), arm("b", worse), "test")
    assert same[0] == 0
    assert same[3] == 1.0


TINY = {
    "settings": {
        "env": "toybox",
        "env_options": {"train": 8, "validation": 4, "test": 6, "hops": [1, 1], "sources": 2, "distractors": 0},
        "model": "toybox",
        "model_config": {
            "model_type": "qwen3",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 1024,
        },
        "num_rollouts": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "kl_coef": 0.0,
        "max_turns": 2,
        "max_turn_tokens": 8,
        "max_response_tokens": 64,
        "eval_tasks": 4,
        "eval_split": "validation",
        "eval_temperature": 1.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "latent_trace_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    },
    "warm_start": {"seed": 0, "settings": {"warm_start_steps": 2, "warm_start_lr": 1e-3, "warm_start_batch_size": 2}},
    "seeds": {"tuning": [9], "arms": [0], "ablations": [0]},
    "tuning": {"learning_rate": [1e-3]},
    "evaluation": {
        "warm_start": {
            "validation": {"split": "validation", "tasks": 4},
            "with_trace": {"split": "validation", "tasks": 4, "trace": True},
            "groups": {"split": "validation", "tasks": 2, "rollouts": 3},
        },
        "arms": {
            "test": {"split": "test", "tasks": 6},
            "unseen": {"split": "test", "tasks": 3, "env_options": {"sides": ["upper", "lower"]}},
            "longer": {"split": "test", "tasks": 2, "env_options": {"hops": [2, 2]}, "limits": {"max_turns": 3}},
            "with_trace": {"split": "test", "tasks": 4, "trace": True},
        },
        "ablations": {
            "test": {"split": "test", "tasks": 6},
            "with_trace": {"split": "test", "tasks": 4, "trace": True},
        },
    },
    "ablated": "pact",
    "arms": {"pact": {"label": "PACT", "tune": ["learning_rate"], "settings": {"anchor_q": 0.4}}},
    "ablations": {"no_anchor": {"label": "q = 0", "settings": {"anchor_q": 0.0}}},
}


def test_a_tiny_study_from_end_to_end(tmp_path, capsys):
    study = Study(yaml.safe_load(yaml.safe_dump(TINY)))
    folders = (tmp_path / "records", tmp_path / "work")
    assert not runner_module.Runner(study, *folders, workers=1, until=0.0).run()  # no time: nothing is begun
    assert not folders[0].exists()
    runner = runner_module.Runner(study, *folders, workers=1, until=float("inf"))
    assert runner.run()
    assert "pact-seed0: " in capsys.readouterr().out
    assert "pact-seed0: " in (folders[1] / "progress.log").read_text()
    lines = {stage: (folders[0] / f"{stage}.jsonl").read_text().splitlines() for stage in STAGES if stage != "sft_coef"}
    assert [len(records) for records in lines.values()] == [1, 1, 1, 1]
    [arm] = map(json.loads, lines["arms"])
    assert arm["curve"]["step"] == [0, 1, 2]
    assert len(arm["curve"]["gap"]) == 1
    assert {split: result["tasks"] for split, result in arm["final"].items()} == {
        "test": 6,
        "unseen": 3,
        "longer": 2,
        "with_trace": 4,
    }
    [warm] = map(json.loads, lines["warm_start"])
    assert arm["start_weights"] == warm["weights"] != arm["weights"]
    assert arm["cost"]["sampled_tokens"] > 0 < arm["cost"]["trained_tokens"] < arm["cost"]["dense_tokens"]

    again = runner_module.Runner(study, *folders, workers=1, until=float("inf"))
    assert again.run()  # all on record: no process is started
    assert capsys.readouterr().out == ""
    text = "".join(f"<!-- study:{name} -->\nold\n<!-- end -->\n" for name in study_report.TABLES)
    page = study_report.filled(text, study, again.records)
    assert "old" not in page
    assert "| PACT | 1 |" in page
    assert "| q = 0 | 1 |" in page
    assert study_report.filled(page, study, again.records) == page
    other = Study(study.config, "other")
    assert study_report.filled(text, other, again.records) == text  # marks of another study stay as they are
    study_report.draw(study, again.records, tmp_path)
    study_report.draw_ablations(study, again.records, tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert (tmp_path / "ablations.png").stat().st_size > 5000
    assert runner_module.plan(again).splitlines()[-1].startswith("together")


def test_every_study_in_the_repository_is_one():
    for path in study_report.STUDIES:
        study = Study.load(path)
        assert study.records.parent.name == "results"
        assert study.name == study.work.name == path.stem
        assert study.jobs("warm_start", {})[0].settings["env"] == "toybox"


def test_every_record_is_a_run_of_its_study():
    """Runs of earlier settings do not stay among the records."""
    for path in study_report.STUDIES:
        study = Study.load(path)
        records = load_records(sorted(study.records.glob("*.jsonl")))
        wanted = set()
        for stage in STAGES:
            with contextlib.suppress(Unfinished):
                wanted |= {job.key for job in study.jobs(stage, records)}
        assert sorted(record["name"] for key, record in records.items() if key not in wanted) == []


def test_pages_are_what_the_records_give():
    assert study_report.main(["--check"]) == 0
