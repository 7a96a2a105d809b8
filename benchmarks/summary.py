"""The figures of results/ as a table, written into README.md between its two markers.

    python -m benchmarks.summary

Run it after benchmarks whose results are to stay.
"""

from __future__ import annotations

import json
import re

from benchmarks.common import HERE, Figure

ORDER = ("bus_bound", "binary", "model_bound", "latency", "memory", "startup", "rabbitmq", "sqs", "s3_sink", "files")


def main() -> None:
    """Read what was kept, write the table."""
    lines = ["| benchmark | figure | target | measured | |", "|---|---|---|---|---|"]
    for name in ORDER:
        file = HERE / "results" / f"{name}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        machine = result["machine"]
        for kept in result["figures"]:
            met = kept.pop("met")
            figure = Figure(**kept)
            unit = f" {figure.unit}" if figure.unit else ""
            sign = "≥" if figure.at_least else "≤"
            measured = f"{figure.value:.3g}{unit}"
            verdict = "met" if met else "**missed**"
            lines.append(f"| `{name}` | {figure.name} | {sign} {figure.limit:g}{unit} | {measured} | {verdict} |")
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if name != "inferbus")
    lines += ["", f"{machine['cpu']}, {machine['cores']} cores shared with the broker; {machine['kafka']}; "
              f"Python {machine['python']}, {versions}."]  # fmt: skip
    readme = HERE / "README.md"
    table = "\n".join(lines)
    text = re.sub(r"(<!-- results -->\n).*(<!-- end -->)", rf"\1{table}\n\2", readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)
    print(table)


if __name__ == "__main__":
    main()
