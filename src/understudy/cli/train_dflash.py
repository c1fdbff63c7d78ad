"""`understudy train dflash`: a drafter that fills in a whole block in one pass."""

from understudy.cli.offline import offline_command

command = offline_command("dflash")
