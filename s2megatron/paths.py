"""What a path that a user wrote means: the same on the command line and in a run file."""

import os


def user_path(text: str) -> str:
    """The path with a leading `~` or `~name` as a home folder, as a shell has it.

    A shell leaves it alone in `--out=~/x`, in quotes and in a run file. A folder that is really
    called `~` is `./~`. Spaces need no escaping anywhere.
    """
    return os.path.expanduser(text) if text.startswith("~") else text
