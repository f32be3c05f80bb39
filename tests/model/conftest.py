from downloads import hub, quick_retries, sharded, single  # noqa: F401
from repertory_fixtures import base, cache, in_float64, load_base, make_spec, plain_attention  # noqa: F401
