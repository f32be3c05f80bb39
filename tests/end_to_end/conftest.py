from repertory_fixtures import cache  # noqa: F401
