"""Put the tables of training/results into the documents that show them: python training/tables.py [--check]."""

import pathlib
import re
import sys

import certify
import pandas as pd

from nfzoo.files import atomic

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "training" / "results"


def _certificates() -> str:
    return certify.markdown(pd.read_csv(RESULTS / "certify.csv"))


def _int8() -> str:
    lines = ["| network | float32 % | int8 % | float32 MB | int8 MB | float32 ms | int8 ms |", "| --- |" + " --- |" * 6]
    for row in pd.read_csv(RESULTS / "int8.csv").itertuples():
        accuracies = f"{100 * row.float32_accuracy:.2f} | {100 * row.int8_accuracy:.2f}"
        rest = f"{row.float32_mb:.1f} | {row.int8_mb:.1f} | {row.float32_ms:.2f} | {row.int8_ms:.2f}"
        lines.append(f"| {row.model} | {accuracies} | {rest} |")
    return "\n".join(lines)


def _races(pattern: str):
    def table() -> str:
        """The newest line of each comparison."""
        lines = ["| case | against | ratio | min … max | at most | ms | MB |", "| --- |" + " --- |" * 6]
        races = pd.read_csv(RESULTS / "benchmark.csv").drop_duplicates(["case", "peer"], keep="last")
        for row in races[races.case.str.fullmatch(pattern)].itertuples():
            spread = "" if pd.isna(row.ratio_min) else f"{row.ratio_min:.2f} … {row.ratio_max:.2f}"
            target = "" if pd.isna(row.target) else f"{row.target:.2f}"
            memory = "" if pd.isna(row.our_peak_mb) else f"{row.our_peak_mb:.0f} / {row.peer_peak_mb:.0f}"
            time = f"{row.our_ms:.1f} / {row.peer_ms:.1f}"
            lines.append(f"| {row.case} | {row.peer} | {row.ratio:.2f} | {spread} | {target} | {time} | {memory} |")
        return "\n".join(lines)

    return table


def _small_batches() -> str:
    """Test accuracy of every variant at every batch size, mean ± deviation over seeds."""
    results = pd.read_csv(RESULTS / "small_batches.csv")
    results[["variant", "batch"]] = results.row.str.split(", batch ", expand=True)
    table = (100 * results.set_index(["variant", "batch"]).test_accuracy).groupby(level=[0, 1], sort=False)
    cells = (table.mean().map("{:.1f}".format) + table.std().map(" ± {:.1f}".format)).unstack(sort=False)
    lines = [f"| batch size | {' | '.join(cells.columns)} |", "| --- |" + " --- |" * len(cells.columns)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in cells.iterrows())])


def _reproduced(name: str):
    def table() -> str:
        import reproduce

        return reproduce.markdown(name, pd.read_csv(RESULTS / f"{name}.csv"))

    return table


def _contest(budget: str, finalists: bool = False):
    def table() -> str:
        import gap

        return gap.markdown(budget, pd.read_csv(RESULTS / "gap.csv"), finalists)

    return table


def _branches() -> str:
    import signals

    return signals.gap_tables(signals.signals_of("gap"))


def _profiles() -> str:
    import profiles

    return profiles.markdown(pd.read_csv(RESULTS / "profiles.csv"))


def _memory() -> str:
    """Counted by `nfzoo.memory`, and the peak of the process that trains."""
    from nfzoo import memory, registry

    races = pd.read_csv(RESULTS / "benchmark.csv").drop_duplicates(["case", "peer"], keep="last")
    races = races[races.case.str.startswith("memory_")]
    peaks = {row.case.split("_")[1]: row.our_peak_mb for row in races.itertuples()} | {
        "bn": races.peer_peak_mb.median()
    }
    lines = [
        "| ResNet-50, 224 px | kept, MB per image | outputs, MB per image | peak at batch 16, MB |",
        "| --- |" + " --- |" * 3,
    ]
    for variant, peak in sorted(peaks.items(), key=lambda item: item[0] != "bn"):
        found = memory.stored(registry.build(f"{variant}_resnet50"))
        lines.append(f"| {variant} | {found.kept / 1e6:.1f} | {found.outputs / 1e6:.1f} | {peak:.0f} |")
    return "\n".join(lines)


def _models(family: str):
    def table() -> str:
        """A family's rows by size, and which variants of them others have published weights of."""
        from nfzoo import names, registry
        from nfzoo.convert import published

        def stated(architecture: str, source: str) -> str:
            """How the weights are asked for: under our name, or theirs where they are of another reading."""
            name = names.parse(architecture)
            try:
                published.find(str(name), source)
            except ValueError:
                return f"{name.variant}: {source} (as `{architecture}`)"
            return f"{name.variant}: {source}"

        known: dict[str, dict[str, None]] = {}
        for source, architectures in published.TABLE.items():
            for architecture in architectures:
                known.setdefault(names.parse(architecture).row, {})[stated(architecture, source)] = None
        lines = [
            "| architecture | px | parameters, M | multiply-adds, G | published weights |",
            "| --- |" + " --- |" * 4,
        ]
        infos = {name.row: registry.model_info(str(name)) for name in names.table().values()
                 if name.family == family and name.variant == "bn" and not name.row.startswith("test_")}  # fmt: skip
        for row, info in sorted(infos.items(), key=lambda item: item[1].multiply_adds):
            counts = f"{info.parameters / 1e6:.2f} | {info.multiply_adds / 1e9:.3g}"
            lines.append(f"| {row} | {info.input_size} | {counts} | {', '.join(known.get(row, ()))} |")
        return "\n".join(lines)

    return table


TABLES = {
    "beginnings": _races("import|build_.*"),
    "certify": _certificates,
    "gap_a": _contest("A"),
    "gap_a_finals": _contest("A", finalists=True),
    "gap_b": _contest("B"),
    "gap_branches": _branches,
    "int8": _int8,
    "latency": _races("(latency|exported)_.*"),
    "memory": _memory,
    "profiles": _profiles,
    "small_batches": _small_batches,
    **{name: _reproduced(name) for name in ("poster_table1", "first_look", "ffnn_table3")},
    **{f"models_{family}": _models(family) for family in ("efficientnet", "resnet", "nfnet", "regnet", "ffnn")},
    "training": _races("nfnet_f0|nf_resnet50|efficientnet_b0_32px|.*_against_bn|agc|input_pipeline_.*"),
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A document with its tables as the results have them: what follows a mark <!-- NAME -->."""
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.M):
        marked = rf"(<!-- {name} -->\n)\n*(?:\|.*\n)*\n*"
        text = re.sub(marked, lambda mark, n=name: f"{mark[1]}\n{TABLES[n]()}\n\n", text)
    return text.rstrip("\n") + "\n"


if __name__ == "__main__":
    stale = [path for path in DOCUMENTS if filled(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{'stale' if '--check' in sys.argv else 'filled'}: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            whole = filled(path.read_text())
            with atomic(path) as partial:
                partial.write_text(whole)
    sys.exit(bool(stale) and "--check" in sys.argv)
