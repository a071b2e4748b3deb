"""The launch's claims, each with the commands that reproduce it here and the last result.

registry     what is claimed, by which steps it is reproduced, what would count as reproduced
steps        commands with a name; a finished one is not run again
measures     a finished run's files -> values
results      values -> a record with its verdict; the newest record of a claim
page         docs/claims.md
"""
