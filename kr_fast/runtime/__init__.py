"""What every long job needs, written once: process state, atomic files, run folders, journals, seeds, progress."""
