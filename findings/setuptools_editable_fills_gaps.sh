#!/usr/bin/env bash
# setuptools 80: an editable install of a flat project maps every package and subpackage to its folder, in a finder on sys.meta_path. Another
# checkout of the project that comes first on PYTHONPATH is imported first, but a subpackage that it lacks is silently taken from the editable
# one: `import shop.new` works in a checkout that has no shop/new, and runs another version's code against this one's.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check setuptools==80.9.0 wheel==0.45.1
for version in old new; do
    mkdir -p "$here/$version/shop" "$here/$version/tools"
    echo "VERSION = '$version'" >"$here/$version/shop/__init__.py"
    touch "$here/$version/tools/__init__.py"
    printf 'from setuptools import find_packages, setup\nsetup(name="shop", version="1", packages=find_packages())\n' >"$here/$version/setup.py"
done
mkdir "$here/new/shop/fresh"
echo "from shop import VERSION" >"$here/new/shop/fresh/__init__.py"
"$here/env/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation --editable "$here/new"
cd /
PYTHONPATH="$here/old" "$here/env/bin/python" - <<'PY'
import importlib.metadata

import shop
import shop.fresh

print("setuptools", importlib.metadata.version("setuptools"), "| shop of", shop.VERSION, "| shop.fresh from", shop.fresh.__file__.split("/")[-4])
assert shop.VERSION == "old" and "/new/shop/fresh/" in shop.fresh.__file__, "this has changed"
PY
echo "as found"
