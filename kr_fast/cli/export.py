"""``kr-fast export``: what leaves a finished run."""

import argparse

from kr_fast.cli.parser import add_common


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.recycling.exporting.synthetic_set import FORMATS

    parser = subparsers.add_parser(
        "export",
        help="the Student and the synthetic images of a finished run, as folders that others open",
        description="Write OUT/student (weights, classes, normalisation, model card; kr_fast.load_student reads it) "
        "and OUT/synthetic (images, labels and what the Student was taught of them, data card, Croissant metadata). "
        "Nothing of a real image or of its file is in them.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a finished run of kr-fast run")
    parser.add_argument("out", metavar="OUT", help="new or empty folder")
    words = "of the images: parquet (a Hugging Face data set), webdataset or npz (default: parquet)"
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=words)
    words = "also the Student as an ONNX model, checked by onnxruntime (kr-fast[onnx])"
    parser.add_argument("--onnx", action="store_true", help=words)
    words = "also the Student as a program of torch.export, model.pt2"
    parser.add_argument("--torch-export", action="store_true", help=words)
    add_common(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export, print the folders and the verdict."""
    from kr_fast.recycling.exporting.job import export_run
    from kr_fast.report.guarantee import contradiction
    from kr_fast.report.sections import verdict
    from kr_fast.runtime import state

    options = {"format": arguments.format, "onnx": arguments.onnx, "torch_export": arguments.torch_export}
    done = export_run(arguments.run_folder, arguments.out, **options)
    if not state.current().is_main:
        return 0
    if done.metrics["verdict"] is not None:
        print("\n".join(verdict.lines(done.metrics["verdict"], done.metrics.get("guarantee"))))
    if wrong := contradiction(done.metrics):
        print(wrong)
    told = "the guarantee is" if done.metrics.get("guarantee") else "figures, audit and verdict are"
    print(f"{done.student}: kr_fast.load_student reads it; {told} in its README.md")
    column = f" with {done.images['column']}" if done.images["column"] else ""
    print(f"{done.synthetic}: {done.images['count']} images{column} ({done.images['format']})")
    return 0
