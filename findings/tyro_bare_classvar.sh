#!/usr/bin/env bash
# tyro 0.9.2 and 1.0.17: a dataclass with a class attribute that is annotated `ClassVar` alone.
#
# One would guess: dataclasses leave a ClassVar out of the fields whether it is subscripted or not, so a
#   command line made of the dataclass has no such flag. (Source: tyro/_resolver.py of 0.9.2 asks
#   `get_origin(field.type) is ClassVar`, which is None for the bare name.)
# Behaviour: 0.9.2 takes the bare one for a flag, and every command line fails when the dataclass is
#   made; `ClassVar[dict]` is left out. 1.0.17 leaves out both.
# Output seen:
#   0.9.2 bare: TypeError: Bare.__init__() got an unexpected keyword argument 'table'
#   0.9.2 subscripted: Subscripted(rate=2.0)
#   1.0.17 bare: Bare(rate=2.0)
#   1.0.17 subscripted: Subscripted(rate=2.0)
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/flags.py" <<'PY'
from dataclasses import dataclass
from typing import ClassVar

import tyro


@dataclass
class Bare:
    rate: float = 1.0
    table: ClassVar = {"rate": "above 0"}


@dataclass
class Subscripted:
    rate: float = 1.0
    table: ClassVar[dict] = {"rate": "above 0"}


for name, kind in (("bare", Bare), ("subscripted", Subscripted)):
    try:
        print(name, tyro.cli(kind, args=["--rate", "2"]), sep=": ")
    except TypeError as error:
        print(name, f"TypeError: {error}", sep=": ")
PY
for version in 0.9.2 1.0.17; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "tyro==$version"
  "$folder/$version/bin/python" "$folder/flags.py" | sed "s/^/$version /" | tee -a "$folder/seen"
done
diff "$folder/seen" <(sed -n 's/^#   \([01]\.[0-9.]* .*\)/\1/p' "$0")
