"""Small sets in MedMNIST layout and every other, and the two ways in which reading images may end."""

import csv
import io
import json
import tarfile

import numpy as np
from PIL import Image

from kr_fast.runtime.errors import UserError


def arrays(train=40, val=12, test=20, shape=(8, 8, 1), classes=4, seed=0):
    draw = np.random.default_rng(seed)
    result = {}
    for which, count in (("train", train), ("val", val), ("test", test)):
        if count:
            result[f"{which}_images"] = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
            result[f"{which}_labels"] = np.arange(count)[:, None] % classes
    return result


def write_npz(path, **changes):
    result = arrays() | changes
    np.savez(path, **{key: value for key, value in result.items() if value is not None})
    return path


def read_or_refused(read):
    """What ``read()`` returns, or None where it refuses, which it must do in one line."""
    refused = None
    try:
        return read()
    except UserError as error:
        refused = str(error)
    assert refused.startswith("data: ")
    assert "\n" not in refused
    return None


# One set, split -> (images, labels), as files: each function returns (source, options of reading it).


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def files_of(parts):
    """(split, class, name, content) of each image, in the order of the set."""
    for which, (images, labels) in parts.items():
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield which, int(label), f"{row:03d}.png", png(image)


def as_folder(root, parts):
    for which, label, name, content in files_of(parts):
        path = root / (which if len(parts) > 1 else "") / f"c{label}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root, {}


def as_table(root, parts):
    root.mkdir()
    with open(root.with_suffix(".csv"), "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "label", *(["split"] if len(parts) > 1 else [])))
        for which, label, name, content in files_of(parts):
            (root / f"{which} {name}").write_bytes(content)
            rows.writerow((f"{which} {name}", f"c{label}", *([which] if len(parts) > 1 else [])))
    return root, {"table": str(root.with_suffix(".csv"))}


def as_parquet(root, parts):
    import pyarrow.parquet

    root.mkdir()
    for split in parts:
        rows = [(content, f"c{label}") for which, label, _, content in files_of(parts) if which == split]
        columns = dict(zip(("image", "label"), map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), root / f"{split if len(parts) > 1 else 'set'}.parquet")
    return root, {}


def as_shards(root, parts):
    root.mkdir()
    for split in parts:
        with tarfile.open(root / f"{split if len(parts) > 1 else 'set'}-000000.tar", "w") as archive:
            for which, label, name, content in files_of(parts):
                for member, inside in ((name, content), (name[:-3] + "cls", f"c{label}".encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(inside)
                    if which == split:
                        archive.addfile(info, io.BytesIO(inside))
    return root, {}


def as_npz(root, parts):
    path = root.with_suffix(".npz")
    prefix = {which: f"{which}_" if len(parts) > 1 else "" for which in parts}
    images = {f"{prefix[which]}images": each for which, (each, _) in parts.items()}
    np.savez(path, **images, **{f"{prefix[which]}labels": each for which, (_, each) in parts.items()})
    return path, {}


def as_saved(root, parts):
    """What ``save_to_disk`` of the package ``datasets`` writes."""
    import pyarrow

    root.mkdir()
    if len(parts) > 1:
        (root / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    for split in parts:
        rows = [({"bytes": content, "path": name}, f"c{c}") for w, c, name, content in files_of(parts) if w == split]
        table = pyarrow.table(dict(zip(("image", "label"), map(list, zip(*rows, strict=True)), strict=True)))
        folder = root / split if len(parts) > 1 else root
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
        with pyarrow.ipc.new_stream(folder / "data.arrow", table.schema) as file:
            file.write_table(table)
    return root, {}
