from hub_service import hub, original  # noqa: F401
from repertory_fixtures import cache  # noqa: F401
