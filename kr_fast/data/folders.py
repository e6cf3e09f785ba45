"""The tree of a folder of images: which files are images, of which class and split, and which are not read.

``class/image.png``, or ``train/``, ``val/`` and ``test/`` of such; below a class any depth, as torchvision reads it.
Of a file without a suffix, the first bytes tell whether it is DICOM; no image is opened here.
"""

import dataclasses
import os
from collections import Counter
from pathlib import Path

from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.splits import CLASSES, split_name, splits_in
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.storage import files

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".dcm", ".dicom")  # any case
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")  # no user's folders
OURS = "folder* written by kr-fast"
DEPTH = 64
NO_CLASSES = "hold one folder of images for each class"  # the rule that a folder without them breaks


@dataclasses.dataclass
class Folder:
    """The content of ``path``.

    ``unread`` counts files by suffix (``.txt``, "" for none that looks like one), and the rest by description.
    ``again``: (link, first place) of links to folders that had been read at another place.
    """

    path: Path
    images: list[Path] = dataclasses.field(default_factory=list)
    folders: "dict[str, Folder]" = dataclasses.field(default_factory=dict)
    unread: Counter = dataclasses.field(default_factory=Counter)
    again: list[tuple[Path, Path]] = dataclasses.field(default_factory=list)

    def all_images(self) -> list[Path]:
        """At any depth, by name."""
        below = [image for folder in self.folders.values() for image in folder.all_images()]
        return sorted(self.images + below, key=lambda path: path.parts)

    def all_unread(self) -> Counter:
        """At any depth."""
        return sum((folder.all_unread() for folder in self.folders.values()), self.unread)

    def all_again(self) -> list[tuple[Path, Path]]:
        """At any depth."""
        return self.again + [pair for folder in self.folders.values() for pair in folder.all_again()]

    def suffixes(self) -> str:
        """`` (it holds 3 .gif)`` for files that are not read; else an empty text."""
        kinds = Counter({key: count for key, count in self.all_unread().items() if _is_suffix(key)})
        counts = [f"{count} {key or 'other'}" for key, count in kinds.most_common()]
        return f" (it holds {listed('', counts, 5)})" if counts else ""

    def is_ours_alone(self) -> bool:
        """Whether it holds folders that kr-fast wrote and nothing else, so that it is no class."""
        unread = self.all_unread()
        return bool(unread[OURS]) and not any(map(_is_suffix, unread)) and not self.all_images()


def find(path: Path) -> tuple[dict[str, list[list[Path]]], tuple[str, ...], list[str], list[str]]:
    """The images below ``path``.

    Returns: (split -> images of each class in the order of their names, names of the classes, a note on what is not
        read, a warning on what is suspicious, both without names). A source without splits has one, ``all``.
    Raises: UserError naming the folder, and what it must be.
    """
    if written_by_us(path):
        fail("data", "source", "hold images as class/image.png", f"{printable(path)}, which kr-fast wrote")
    top = scan(path, {})
    roots = _roots(top)
    _check_links(top, splits=roots != {"all": top})
    first = next(iter(roots.values()))
    names = tuple(sorted(_class_folders(first)))
    _check_names(names, first)
    splits = {}
    for which, root in roots.items():
        classes = _class_folders(root)
        if unknown := sorted(classes.keys() - set(names)):
            got = f"{printable(unknown[0])} (move some of its images to train, or remove it)"
            fail("data", f"{which} class folders", f"be among those of {printable(first.path)}", got)
        splits[which] = [classes[name].all_images() if name in classes else [] for name in names]
        if not any(splits[which]):
            rule = f"hold images as class/image.png ({', '.join(SUFFIXES)})"
            fail("data", "source", rule, f"none in {printable(root.path)}{root.suffixes()}")
    if len(names) == 1:
        remedy = f"give {printable(first.path / names[0])} if the classes are the folders in it"
        fail("data", "number of classes", f"be {CLASSES[0]} to {CLASSES[1]}", f"1, {names[0]} ({remedy})")
    empty = [name for name, images in zip(names, splits[next(iter(roots))], strict=True) if not images]
    if empty:
        content = _class_folders(first)[empty[0]].suffixes() or " (it is empty: remove it if it is no class)"
        fail("data", "every class", "have a training image", f"none of {listed('', empty, 5)}{content}")
    return splits, names, _note(top, list(roots.values())), _warning(list(_class_folders(first).values()))


def scan(path: Path, seen: dict[tuple[int, int], Path], above: tuple[tuple[int, int], ...] = ()) -> Folder:
    """The tree below ``path``.

    Args:
        seen: the folders that were read and where, so that links cannot lead in circles.
        above: the folders that ``path`` lies in.
    """
    folder = Folder(path)
    try:
        above = (*above, _identity(path))
        seen[above[-1]] = path
        entries = sorted(os.scandir(path), key=_first_to_read)
    except OSError as error:
        raise UserError(f"data: source must be a readable folder, got {printable(path)} ({error.strerror})") from error
    if len(above) > DEPTH + 1:
        fail("data", "source", f"have folders at most {DEPTH} deep", printable(f"{str(path)[:200]}..."))
    for entry in entries:
        kind = _kind(entry)
        if entry.name.startswith(".") or entry.name in SYSTEM:
            folder.unread[f"hidden {kind}"] += 1
        elif kind == "file":
            suffix = Path(entry.name).suffix.lower()
            if suffix in SUFFIXES or (not (key := unread_key(suffix)) and _is_dicom(entry)):
                folder.images.append(Path(entry.path))
            else:
                folder.unread[key] += 1
        elif (identity := _identity(entry.path)) in seen:
            folder.unread["link* to folders that are read already"] += 1
            folder.again += [] if identity in above else [(Path(entry.path), seen[identity])]
        elif written_by_us(Path(entry.path)):
            folder.unread[OURS] += 1
        else:
            folder.folders[entry.name] = scan(Path(entry.path), seen, above)
    return folder


def unread_key(suffix: str) -> str:
    """What files with ``suffix`` are counted as in ``Folder.unread``: "" where it is none, as in 1.2.840.113619."""
    return suffix if suffix[1:2].isalpha() and suffix[1:].isalnum() and len(suffix) <= 6 else ""


def _first_to_read(entry: os.DirEntry) -> tuple[bool, bool, str]:
    """The order in a folder: splits before folders beside them, and folders before links to them."""
    return split_name(entry.name) is None, entry.is_symlink(), entry.name


def _kind(entry: os.DirEntry) -> str:
    try:
        return "folder" if entry.is_dir() else "file"
    except OSError:  # a link to itself
        return "file"


def _is_dicom(entry: os.DirEntry) -> bool:
    """Whether a file without a suffix is DICOM, as archives export it; ``DICOMDIR`` lists files and is no image."""
    try:
        if entry.name == "DICOMDIR" or not entry.is_file():
            return False
        with open(entry.path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def written_by_us(path: Path) -> bool:
    """Whether ``path`` is a run, an audit or a synthetic set."""
    try:
        if (path / "config.yaml").is_file() and any((path / name).exists() for name in ("journal.json", ".lock")):
            return True
        manifest = files.read_json(path / "manifest.json", dict) if (path / "manifest.json").is_file() else {}
    except (UserError, OSError):  # scan reports a folder that cannot be read
        return False
    return {"first_id", "shard_size", "sampler"} <= manifest.keys()


def _class_folders(root: Folder) -> dict[str, Folder]:
    return {name: folder for name, folder in root.folders.items() if not folder.is_ours_alone()}


def _roots(top: Folder) -> dict[str, Folder]:
    """split -> folder of class folders; ``all`` where the folders of ``top`` are the classes."""
    folders = _class_folders(top)
    if not folders:
        got = f"{counted(len(top.images), 'image')} and no folder in {printable(top.path)}{top.suffixes()}"
        got += " (a table of their classes is given by --table)" if top.images else ""
        fail("data", "source", NO_CLASSES, got)
    splits: dict[str, list[str]] = {}
    for name in folders:
        if which := split_name(name):
            splits.setdefault(which, []).append(name)
    named = sum(map(len, splits.values()))
    if "train" in splits and (len(splits) > 1 or named == len(folders)):
        for which, names in splits.items():
            if len(names) > 1:
                fail("data", "source", f"hold one folder of the {which} split", listed("", names))
        roots = {which: folders[splits[which][0]] for which in ("train", "val", "test") if which in splits}
        for which, root in roots.items():
            if not _class_folders(root):
                got = f"{counted(len(root.images), 'image')} and no folder in {printable(root.path)}"
                remedy = "" if which == "train" else f" (remove it, and {which} is cut from the training images)"
                fail("data", "source", "hold one folder of images for each class", got + remedy)
        return roots
    if named == len(folders) > 1:
        fail("data", "source", f"hold a folder train beside {listed('', list(folders))}", printable(top.path))
    for name, folder in folders.items():
        below = {split_name(each) for each in folder.folders} - {None}
        if len(below) > 1:
            got = f"{printable(name)} with {listed('', list(folder.folders))}"
            got += f" (give {printable(folder.path)})" if len(folders) == 1 else ""
            fail("data", "source", "have its splits above its classes, as train/class/image.png", got)
        if split_name(name) and folder.folders:  # a class may be called train, but this is no class
            rule = "hold the folders of splits (train, val, test) alone, or classes alone"
            fail("data", "source", rule, listed("", list(folders)))
    meant = {name: splits_in(name) for name, folder in folders.items() if folder.folders and not folder.images}
    if "train" in (which := set().union(*meant.values())) and len(which) > 1:
        got = listed("", [name for name in sorted(meant) if meant[name]])
        fail("data", "source", "name the folders of its splits train, val and test", got)
    return {"all": top}


def _check_links(top: Folder, splits: bool) -> None:
    """Refuse a folder that is linked into two classes or splits: its images would be read twice, or be missing."""
    depth = len(top.path.parts)
    for here, there in top.all_again():
        place, first = here.parts[depth:], there.parts[depth:]
        if place[: 1 + splits] != first[: 1 + splits] and not (splits and split_name(place[0]) is None):
            got = f"{printable('/'.join(place))}, which is {printable('/'.join(first))}"
            fail("data", "source", "hold each folder once", got)


def _warning(classes: list[Folder]) -> list[str]:
    """A warning where folds, masks or classes may lie below the folders that are read as classes."""
    if any(folder.images for folder in classes):
        return []
    same = set.intersection(*({*folder.folders} for folder in classes))
    if len(same) < 2:
        return []
    note = f"every class folder holds folders of the same {len(same)} names, and all their images are taken"
    return [f"{note}: check that they are no masks, folds or classes"]


def _check_names(names: tuple[str, ...], root: Folder) -> None:
    if len(names) > CLASSES[1]:
        got = f"{len(names)} folders in {printable(root.path)}"
        fail("data", "number of classes", f"be {CLASSES[0]} to {CLASSES[1]}", got)
    for name in names:
        if not name.isprintable():  # they stand in pages and in JSON
            fail("data", "class folders", "have names that can be printed, in UTF-8", printable(name))


def _note(top: Folder, roots: list[Folder]) -> list[str]:
    """How many files are left out; without their names, so that a page can show it."""
    if roots == [top]:
        unread, loose = top.all_unread(), len(top.images)
    else:
        unread = sum((root.all_unread() for root in roots), Counter(top.unread))
        unread["folder* beside the splits"] = len(top.folders) - len(roots)
        loose = len(top.images) + sum(len(root.images) for root in roots)
    unread["image* outside the class folders"] = loose
    return unread_note(unread)


def unread_note(unread: Counter) -> list[str]:
    """A note on files that are not read, counted as in :class:`Folder`; none for none."""
    suffixes = Counter({key: count for key, count in unread.items() if count and _is_suffix(key)})
    parts = []
    if suffixes:
        kinds = [key or "other" for key, _ in suffixes.most_common()]
        parts.append(f"{counted(suffixes.total(), 'file')} ({listed('', kinds, 5)})")
    parts += [counted(count, what) for what, count in unread.items() if count and not _is_suffix(what)]
    return [f"not read: {', '.join(parts)}"] if parts else []


def _is_suffix(key: str) -> bool:
    return not key or key.startswith(".")
