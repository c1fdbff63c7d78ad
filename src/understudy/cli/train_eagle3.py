"""`understudy train eagle3`: a draft layer on the target's hidden states."""

from understudy.cli.offline import offline_command

command = offline_command("eagle3")
