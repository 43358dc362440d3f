"""``report.html``: one file that needs no network, with table, curves, pictures and the command of every cell."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from src import records as store
from src.checks.flags import unreliable
from src.records import Record
from src.report.command import command
from src.report.meanings import explain
from src.report.page.charts import specs
from src.tables import format_eps, images_judged, reading
from src.variant import data_apart
from src.worst import WORST

# Name, kind, and what hovering over the head says. Kinds: word, radius, count, share (percent), number, flags.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("dataset", "word", "What is classified."),
    ("classifier", "word", "What is attacked."),
    ("defense", "word", "What protects it; none is the comparison."),
    ("attack", "word", f"{WORST}: an image holds only if it holds against every attack of that threat model."),
    ("norm", "word", "How the size of a perturbation is measured."),
    ("eps", "radius", "Radius of the perturbation in its norm, pixels in [0, 1]."),
    ("access", "word", "What the attacker knows. gray_box: the bare classifier. white_box: the defended model, "
     "through its defense. black_box: its scores only. transfer: a surrogate trained apart."),
    ("seed", "count", "Seed of everything random."),
    ("aim", "word", "Targeted attacks have to reach a class drawn for them."),
    ("variant", "word", "Overrides that the other columns do not show."),
    ("n", "count", "Images judged, each counted once."),
    ("clean bare", "share", "Accuracy of the bare classifier on clean images, %, with its 95 % Wilson interval."),
    ("clean", "share", "Accuracy of the defended model on clean images, %, with its 95 % Wilson interval."),
    ("robust", "share", "Accuracy of the defended model on attacked images, %, with its 95 % Wilson interval; "
     "unreliable: a decisive sanity check was raised, see flags."),
    ("gap", "number", "gray_box minus white_box in percentage points: what is gone once the attacker knows the "
     "defense. Shown at both."),
    ("success", "share", "Share of the defended model's right answers that the attack turned, %."),
    ("distance", "number", "Median distance of the perturbation, over the images the attack worked on."),
    ("attack ms", "number", "Milliseconds per image of the attack."),
    ("defense ms", "number", "Milliseconds per image of the defended model's forward pass."),
    ("memory MiB", "number", "Most tensor memory at once in that pass over 64 images, weights included, in MiB."),
    ("flags", "flags", "Sanity checks that were raised, and why a cell failed. Hover over each."),
)  # fmt: skip


def write_page(records: Iterable[Record], path: Path, pictures: Sequence[Path] = ()) -> Path:
    """Write the page, whole or not at all.

    Args:
        records: cells and worst cases, failed ones included.
        pictures: PNG files to embed.
    """
    from jinja2 import Environment, PackageLoader

    cells = sorted(records, key=store.order)
    rows = [_row(*each) for each in zip(cells, _gaps(cells), data_apart(cells), strict=True)]
    for row, made in zip(rows, _made(cells), strict=True):
        row["made"] = made
    flags = sorted({flag for record in cells for flag in record.flags})
    content = {
        "columns": [dict(zip(("name", "kind", "help"), column, strict=True)) for column in COLUMNS],
        "rows": rows,
        "flags": {flag: explain(flag) for flag in flags},
        "charts": specs(sorted({record.access for record in cells})),
        "worst": WORST,
        "images": images_judged(cells),
    }
    here = files("src.report.page")
    environment = Environment(loader=PackageLoader("src.report.page", ""), autoescape=True, trim_blocks=True)
    text = environment.get_template("page.html.j2").render(
        title=_title(cells),
        reading=reading(cells).replace("`", ""),
        content=_json(content),
        css=here.joinpath("page.css").read_text(),
        js=here.joinpath("page.js").read_text(),
        vega=_vega(),
        grid_css=files("itables").joinpath("html/dt_bundle.css").read_text(),
        grid=base64.b64encode(files("itables").joinpath("html/dt_bundle.js").read_bytes()).decode(),
        pictures=[(p.stem.replace("_", " "), base64.b64encode(p.read_bytes()).decode()) for p in pictures],
    )
    store.write_whole(path, text.encode())
    return path


def _title(cells: Sequence[Record]) -> str:
    datasets = ", ".join(sorted({r.dataset for r in cells}))
    measured = sum(r.attack != WORST for r in cells)
    return f"Robustness on {datasets or 'nothing'}: {measured:,} cells"


def _gaps(cells: Sequence[Record]) -> list[float | None]:
    """gray_box minus white_box of each cell's setting, percentage points."""
    sound = [r for r in cells if r.status == "done" and not unreliable(r.flags)]
    made = dict(zip((r.key for r in cells), _made(cells), strict=True))
    held = {(r.gap_key, made[r.key], r.access): r.robust_accuracy for r in sound}
    gaps = []
    for r in cells:
        gray, white = (held.get((r.gap_key, made[r.key], a)) for a in ("gray_box", "white_box"))
        one_of_them = r.access in ("gray_box", "white_box")
        gaps.append(round(100 * (gray - white), 2) if one_of_them and gray is not None and white is not None else None)
    return gaps


def _made(cells: Sequence[Record]) -> list[str]:
    """What sets cells of the same names apart, as in :mod:`src.analysis.points`: the stages they are of, repeats."""
    seen: Counter[tuple[object, ...]] = Counter()
    found = []
    for r in cells:
        made = " ".join(key[:8] for key in r.made_of)
        found.append(f"{made} {seen[r.gap_key, r.access, made]}")
        seen[r.gap_key, r.access, made] += 1
    return found


def _row(r: Record, gap: float | None, data: str) -> dict[str, Any]:
    """Short names: ten thousand of them are in the page."""
    failed = r.status == "failed"
    doubtful = [] if failed else [flag for flag in r.flags if unreliable([flag])]

    def attacked(value: float | None) -> float | None:
        return None if doubtful else _share(value)

    return {
        "c": [
            r.dataset, r.classifier, r.defense, r.attack, r.norm, _number(r.eps), r.access, r.seed,
            "targeted" if r.targeted else "untargeted", ",".join(filter(None, [r.variant, data])), r.n,
            _share(r.clean_accuracy), _share(r.clean_accuracy_defended), attacked(r.robust_accuracy), gap,
            attacked(r.attack_success_rate),
            _number(r.distance_median), _number(r.attack_ms_per_image), _number(r.defense_ms_per_image),
            _number(r.defense_memory_mib), r.flags,
        ],
        "eps": format_eps(r.eps),
        "low": attacked(r.robust_accuracy_low),
        "high": attacked(r.robust_accuracy_high),
        "unreliable": doubtful,
        "hollow": _share(r.robust_accuracy) if doubtful else None,  # where its marker stands on the curve
        "failed": failed,
        "why": " ".join(r.reason.split()),
        "key": r.key,
        "stages": r.stages,
        "command": "" if r.attack == WORST else command(r),
    }  # fmt: skip


def _share(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(100 * value, 3)


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    if value is None or math.isnan(value):
        return None
    return "inf" if math.isinf(value) else float(f"{value:.6g}")


def _json(content: Any) -> str:
    """Inside a script element only ``</`` could end it early."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")


def _vega() -> str:
    import vl_convert

    return str(vl_convert.javascript_bundle()).replace("</script", "<\\/script")  # type: ignore[call-arg]
