from repertory_fixtures import base, cache, in_float64, load_base, make_spec  # noqa: F401
