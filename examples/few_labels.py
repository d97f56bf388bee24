"""Table and figure of examples/few_labels.sh, from the records of its runs.

python examples/few_labels.py OUT/runs few-labels.png
"""

import json
import statistics
import sys
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mhkd_report  # noqa: E402 # needs the path above

COLORS = {"ce": "C7", "kd": "C0", "mhkd": "C1"}
WITH = " + unlabelled"
LONGER = ", as many steps"  # as a row with unlabelled images


def main(folder: str, picture: str) -> None:
    rows: dict[str, dict[int, dict]] = {}  # runs by seed
    settings: list[tuple] = []  # of each run, which must be the same
    own: dict[str, set[str]] = {}  # of each row's runs, which must be the same, too
    runs, unusable = mhkd_report.read_runs(folder)
    runs = [run for run in runs if run["config"]["student"].startswith("timm:")]  # no teacher
    if not runs:
        sys.exit(f"there is no finished run of examples/few_labels.sh below '{folder}'")
    epochs = min(run["config"]["epochs"] for run in runs)
    for run in runs:
        config = run["config"]
        name = config["method"] + (WITH if run["unlabelled_sha256"] else "")
        longer = config["method"] == "ce" and config["epochs"] == 4 * epochs
        name += LONGER if longer else ""
        differs = mhkd_report.recipe_of(run) | {"epochs": epochs if longer else config["epochs"]}
        settings.append((run["data_sha256"], differs, config["view_seed"]))
        hashes = {n: run.get(n) for n in ("teacher_sha256", "teacher_heads_sha256")}
        hashes["unlabelled"] = run["unlabelled_sha256"]
        own.setdefault(name, set()).add(json.dumps([config["options"], hashes]))
        own.setdefault("teacher", set()).update(filter(None, [run["teacher_sha256"]]))
        repeated = config["seed"] in rows.setdefault(name, {})
        if settings[-1] != settings[0] or repeated or max(map(len, own.values())) > 1:
            sys.exit(
                f"the runs in '{folder}' differ in EPOCHS, OPTIONS or the teacher, or a run is "
                "there twice: keep one kind of them"
            )
        rows[name][config["seed"]] = run
    rows = {name: rows[name] for name in sorted(rows, key=lambda name: (WITH in name, name))}

    def minus(name: str, base: str) -> str:
        seeds = sorted(rows[name].keys() & rows.get(base, {}).keys())
        if name == base or len(seeds) < 2:
            return ""
        values = [rows[name][s]["accuracy"] - rows[base][s]["accuracy"] for s in seeds]
        mean, _, half = mhkd_report.interval(values)
        text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}], n = {len(seeds)}"
        return text.replace("-", "−")

    table = []
    for name, row in rows.items():
        minutes = statistics.mean(run["seconds"] for run in row.values()) / 60
        accuracy = mhkd_report.mean_and_std([run["accuracy"] for run in row.values()])
        bases = ["ce", "ce" + LONGER if WITH in name else name]
        bases += [name.replace("mhkd", "kd"), name.removesuffix(WITH)]
        table += [[name, accuracy, len(row), *(minus(name, b) for b in bases), f"{minutes:.0f}"]]
    header = ["row", "test accuracy, %", "n", "minus alone", "minus alone" + LONGER]
    header += ["minus kd", "minus without", "minutes"]
    print(*unusable, mhkd_report.markdown(header, table), sep="\n")

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, row in rows.items():
        style = {"color": COLORS[name.removesuffix(WITH).removesuffix(LONGER)], "linewidth": 1}
        style["linestyle"] = "--" if WITH in name else ":" if LONGER in name else "-"
        for run in row.values():
            log = (run["folder"] / "log.jsonl").read_text().splitlines()
            minutes = accumulate(json.loads(line)["seconds"] / 60 for line in log)
            axis.plot([*minutes], [*run["curve"].values()], **style)
        axis.plot([], [], **style, label=f"{name}, n = {len(row)}")
    axis.set(xlabel="minutes of training and testing", ylabel="test accuracy, %")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=200)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
