"""How a source is read, beside its path: the table of a folder, columns, the size of images, files that are damaged."""

import dataclasses

from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option

RESIZES = ("crop", "pad", "stretch")
COLUMNS = ("image_column", "label_column", "split_column", "group_column")
LARGEST_SIZE = 224


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """The keyword ``options`` of :func:`kr_fast.data.load`, and fields of the same names of a run and an audit."""

    table: str = option(
        "",
        "csv, tsv, JSON lines or parquet file with a row for each image of the folder given as data: its file and its "
        "class",
    )
    image_column: str = option(
        "", "column of files or images; nothing: image, img, file_name, filename, file, path, image_path or image_id"
    )
    label_column: str = option("", "column of classes; nothing: label, labels, class or target")
    split_column: str = option("", "column of splits (train, val, test); nothing: split, or all rows are cut")
    group_column: str = option("", "column of groups (a patient, a site), none of which may lie in two splits")
    image_size: int = option(
        0, "height and width that every image is brought to; 0: as it is", least=0, most=LARGEST_SIZE
    )
    resize: str = option("", "with image_size: crop, pad or stretch images that are no squares")
    skip_unreadable: bool = option(False, "leave out files that cannot be read, and count them, in place of refusing")

    def __post_init__(self):
        check(self, "data")
        self.check_reading("data")

    def check_reading(self, where: str) -> None:
        """Refuse fields that do nothing beside others. Raises: UserError ``where: FIELD must ...``."""
        if self.resize not in ("", *RESIZES):
            fail(where, "resize", "be crop, pad or stretch", self.resize)
        if self.resize and not self.image_size:
            fail(where, "resize", "be left out without image_size", self.resize)

    @property
    def reading(self) -> "ReadOptions":
        """These fields alone, of a configuration that has them among others."""
        return ReadOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ReadOptions)})

    def refuse(self, names: tuple[str, ...], source: str) -> None:
        """Refuse fields that a kind of ``source`` ("a .npz file") cannot use. Raises: UserError naming the first."""
        for name in names:
            if value := getattr(self, name):
                fail("data", name, f"be left out for {source}", repr(value))
