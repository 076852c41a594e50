"""What a fine-tuning job may ask for, on the wire and on the command line: checked strictly, each refusal with its field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, create_model, model_validator
from pydantic_core import PydanticCustomError

from pairloop.config.train import ObjectiveName

MAX_SEED = 2**31 - 1


class _Strict(BaseModel):
    """No coercion, no unknown field, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _auto(value: Any) -> Any:
    """None stands for "auto": the configured value."""
    return None if value == "auto" else value


def _or_auto(given: Any) -> BeforeValidator:
    return BeforeValidator(_auto, json_schema_input_type=given | Literal["auto"] | None)


_Batch = Annotated[int, Field(ge=1, le=256)]
_Factor = Annotated[float, Field(gt=0)]
_Epochs = Annotated[int, Field(ge=1, le=50)]
_Beta = Annotated[float, Field(gt=0, le=2)]
_Group = Annotated[int, Field(ge=2, le=64)]


class SupervisedHyperparameters(_Strict):
    batch_size: Annotated[int | None, Field(ge=1, le=256), _or_auto(_Batch)] = None
    learning_rate_multiplier: Annotated[float | None, Field(gt=0), _or_auto(_Factor)] = None
    n_epochs: Annotated[int | None, Field(ge=1, le=50), _or_auto(_Epochs)] = None


class PreferenceHyperparameters(SupervisedHyperparameters):
    """Further names are the options of ``train`` that the objective reads, such as ``label_smoothing``."""

    model_config = ConfigDict(extra="allow")

    beta: Annotated[float | None, Field(gt=0, le=2), _or_auto(_Beta)] = None


class GroupHyperparameters(PreferenceHyperparameters):
    """``group_size``: answers sampled per prompt where a verifier scores them."""

    group_size: Annotated[int | None, Field(ge=2, le=64), _or_auto(_Group)] = None


class SupervisedMethod(_Strict):
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class PreferenceMethod(_Strict):
    hyperparameters: PreferenceHyperparameters = PreferenceHyperparameters()


class GroupMethod(_Strict):
    """``verifier``: the configured ``label.verifier``, which then scores sampled answers; without it the rows have scores."""

    hyperparameters: GroupHyperparameters = GroupHyperparameters()
    verifier: str | None = None


class Grader(_Strict):
    """The only grader there is: this server's configured verifier, by its name ``module:function``."""

    type: Literal["verifier"]
    name: str


class ReinforcementMethod(_Strict):
    hyperparameters: GroupHyperparameters = GroupHyperparameters()
    grader: Grader


OF_GROUPS = ("kto", "grpo", "rloo", "dr_grpo", "dapo")
"""Objectives that read scored groups of any size."""
_OBJECTIVES = tuple(name for name in get_args(ObjectiveName) if name != "sft")
METHODS: Mapping[str, type[BaseModel]] = {
    "supervised": SupervisedMethod,
    "sft": SupervisedMethod,
    "reinforcement": ReinforcementMethod,
    **{name: GroupMethod if name in OF_GROUPS else PreferenceMethod for name in _OBJECTIVES},
}
"""Each method type with what is said about it, which stands under its own name beside the type."""

_fields: dict[str, Any] = {name: (kind | None, None) for name, kind in METHODS.items()}
_Options: type[_Strict] = create_model("MethodOptions", __base__=_Strict, **_fields)


class Method(_Options):  # type: ignore[misc, valid-type]
    """The method and what it is told: ``{"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}``."""

    type: Literal[tuple(METHODS)]  # type: ignore[valid-type]


_NO_NUL = r"^[^\x00]*$"
"""Postgres keeps no NUL in a text."""
_Text512 = Annotated[str, StringConstraints(max_length=512, pattern=_NO_NUL)]
_Key64 = Annotated[str, StringConstraints(max_length=64, pattern=_NO_NUL)]
_Id = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=_NO_NUL)]
_Model = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=_NO_NUL)]


class JobRequest(_Strict):
    """The body of POST /v1/fine_tuning/jobs. A job without a method is supervised.

    ``warm_start_from``: another word for ``model``; only one of them may be given.
    """

    training_file: _Id
    model: _Model | None = None
    warm_start_from: _Model | None = None
    validation_file: _Id | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_NO_NUL)] | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    metadata: Annotated[dict[_Key64, _Text512], Field(max_length=16)] | None = None
    method: Method | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.model is None and self.warm_start_from is None:
            raise _field_error("model", "name the model that the training starts from")
        if self.model is not None and self.warm_start_from is not None:
            raise _field_error(
                "warm_start_from",
                "model and warm_start_from both say where the training starts; send one of them (model takes a base, a "
                "version such as name@3, and an ft: model alike)",
            )
        if self.method is not None and self.hyperparameters is not None:
            raise _field_error("hyperparameters", "they go under method when a method is given; send one of them")
        if self.validation_file is not None and self.validation_file == self.training_file:
            raise _field_error("validation_file", "it is the training file; validate on other rows, or leave it out")
        for name in METHODS:
            if self.method is not None and name != self.method.type and getattr(self.method, name) is not None:
                raise _field_error(f"method.{name}", f"the method's type is {self.method.type}; leave {name} out")
        if self.method is not None and self.method.type == "reinforcement" and self.method.reinforcement is None:
            raise _field_error(
                "method.reinforcement.grader", 'name the configured verifier: {"type": "verifier", "name": "module:function"}'
            )
        return self

    @property
    def start(self) -> str:
        """The model that the training starts from."""
        start = self.model or self.warm_start_from
        assert start is not None, "one of them is given"
        return start

    @property
    def type(self) -> str:
        """The method's type; ``sft`` is another word for ``supervised``."""
        given: str = self.method.type if self.method is not None else "supervised"
        return "supervised" if given == "sft" else given

    @property
    def options(self) -> Any:
        """What is said about the method, with defaults where nothing is."""
        if self.method is None:
            return SupervisedMethod(hyperparameters=self.hyperparameters or SupervisedHyperparameters())
        return getattr(self.method, self.method.type) or METHODS[self.method.type]()

    @property
    def verifier(self) -> tuple[str, str] | None:
        """The verifier that is named, and the field that names it."""
        if self.type == "reinforcement":
            return self.options.grader.name, "method.reinforcement.grader.name"
        named = getattr(self.options, "verifier", None)
        return None if named is None else (named, f"method.{self.type}.verifier")


def _field_error(param: str, message: str) -> PydanticCustomError:
    """A refusal that comes from two fields together and names one of them."""
    return PydanticCustomError("fields_disagree", "{reason}", {"param": param, "reason": message})
