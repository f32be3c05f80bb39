from repertory_fixtures import cache, load_base, make_spec  # noqa: F401
