"""GET /v1/models: the names this server answers to."""

from typing import Any

from frontend.openai.errors import NotFoundError
from frontend.openai.state import ServerState


def list_models(state: ServerState) -> dict[str, Any]:
    """The list object."""
    return {"object": "list", "data": [_card(state, n) for n in state.model_config.served_names]}


def show_model(state: ServerState, name: str) -> dict[str, Any]:
    """One card.

    Raises:
        NotFoundError: no such model here.
    """
    if name not in state.model_config.served_names:
        raise NotFoundError(f"the model {name[:200]!r} does not exist", param="model")
    return _card(state, name)


def _card(state: ServerState, name: str) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{state.created}",
        "object": "model_permission",
        "created": state.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "heliograph",
        "root": state.model_name,
        "parent": None,
        "permission": [permission],
        "max_model_len": state.model_config.max_model_len,
    }
