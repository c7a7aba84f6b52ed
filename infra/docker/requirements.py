"""Prints the dependencies in pyproject.toml with those of the extras that are named.

The image installs them before it copies the sources: a change of the sources then leaves that layer
alone.
"""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(
    *project["dependencies"],
    *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]),
    sep="\n",
)
