"""`understudy train kangaroo`: the adapter between an exit layer and the frozen head."""

from understudy.cli.offline import offline_command

command = offline_command("kangaroo")
