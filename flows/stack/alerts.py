"""What a team is told of by a webhook: the automations of infra/alerts.yaml on a Prefect server.

`python -P -m flows.stack.alerts` makes them, or brings them up to date, on the server that `PREFECT_API_URL` (and
`PREFECT_API_AUTH_STRING`) names, for the webhook `COPAL_WEBHOOK_URL`.
"""

from __future__ import annotations

import os
import sys

from pydantic import SecretStr

from copal.errors import CopalError, SettingsError, first_line
from flows.stack.deployments import shipped_file
from flows.stack.prefect_server import UpError, client_settings

__all__ = ["ensure_alerts"]


def ensure_alerts(api: str, auth: str | None, webhook: str) -> list[str]:
    """Make the webhook's block and the automations, or bring those that are there to what infra/alerts.yaml says.

    Returns:
        The names of the automations.

    Raises:
        UpError: the server does not answer, or refuses one.
    """
    import httpx
    import yaml
    from prefect.blocks.webhook import Webhook
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore
    from prefect.exceptions import PrefectException
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    wanted = yaml.safe_load(shipped_file("alerts.yaml").read_text(encoding="utf-8"))["automations"]
    server = {PREFECT_API_URL: api} | ({PREFECT_API_AUTH_STRING: auth} if auth else {})
    try:
        with (
            temporary_settings(server),
            get_client(httpx_settings=client_settings(api), sync_client=True) as client,
        ):
            # The server keeps the URL encrypted: it often holds a token.
            block = Webhook(url=SecretStr(webhook)).save("copal", overwrite=True)
            there = {found.name: found.id for found in client.read_automations()}
            for automation in wanted:
                actions = [{**action, "block_document_id": str(block)} for action in automation["actions"]]
                made = AutomationCore.model_validate({**automation, "actions": actions})
                if made.name in there:
                    client.update_automation(there[made.name], made)
                else:
                    client.create_automation(made)
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        raise UpError(f"the alerts could not be made on the Prefect server at {api}: {first_line(error)}") from None
    return [automation["name"] for automation in wanted]


def main() -> int:
    try:
        api, webhook = os.environ.get("PREFECT_API_URL"), os.environ.get("COPAL_WEBHOOK_URL")
        if not api or not webhook:
            raise SettingsError("PREFECT_API_URL and COPAL_WEBHOOK_URL must be set")
        names = ensure_alerts(api, os.environ.get("PREFECT_API_AUTH_STRING"), webhook)
    except CopalError as error:
        print(f"copal: {error}", file=sys.stderr)
        return 2
    print(f"alerts: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
