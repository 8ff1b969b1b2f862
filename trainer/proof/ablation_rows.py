"""The finished rows of an ablation on disk, one file for each variant and seed, and what they depend on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from apt_core.errors import AptError
from apt_core.files.jsonfile import read_object, write_json
from trainer.config import Adversarial, comparable
from trainer.run.identity import differing, refuse_another

from .variants import Variant


@dataclass(frozen=True)
class Rows:
    """The rows in an ablation's folder `out`; recipe: that of its reference row."""

    out: Path
    recipe: str

    def path(self, variant: Variant, seed: int) -> Path:
        return self.out / "results" / f"{variant.name}-seed-{seed}.json"

    def made(self, variant: Variant, seed: int) -> dict | None:
        """The row of a variant and seed, if it has been made; otherwise None. Raises AptError if it was made
        with other settings.
        """
        path = self.path(variant, seed)
        if not path.exists():
            return None
        self.agree(path, settings_of(variant), _filled_in)
        return read(path)

    def agree_on_settings(self, identity: dict) -> None:
        """As `agree`, for what all rows share: phase, recipe, samples, preset."""
        self.agree(self.out / "identity.json", identity, self._comparable)

    def agree_on_source(self, seed: int, fingerprint: str) -> None:
        """As `agree`, for the data and the first weights of a seed."""
        self.agree(self._source(seed), {"source": fingerprint})

    def sources(self, seeds: list[int]) -> dict[str, str]:
        """What `agree_on_source` has stored for these seeds, by seed."""
        return {str(n): read(self._source(n))["source"] for n in seeds if self._source(n).exists()}

    def agree(
        self, path: Path, identity: dict, comparable: Callable[[dict], dict] = lambda found: found
    ) -> None:
        """Write the identity to `path`; if there is one already, raise AptError unless the two agree."""
        if not path.exists():
            write_json(path, identity)
            return
        try:
            old, identity = comparable(read(path)), comparable(identity)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, AptError):
                raise
            raise AptError(f"{path} is damaged: delete {self.out}, or give another --out.") from None
        refuse_another(self.out, "ablation", old, identity)

    def adopt(self, path: Path, identity: dict, variants: Mapping[str, Variant]) -> None:
        """Take over the rows of an earlier table that have not been made here yet.

        Raises AptError for a file that is not such a table, and for a table with another phase, recipe,
        preset or number of samples.
        """
        try:
            found = read(path)
            if changed := differing(self._comparable(found["settings"]), self._comparable(identity)):
                raise AptError(
                    f"{path} is a table with another {changed[0]} than this ablation has: leave it out, "
                    "or give its settings."
                )
            for seed, source in found.get("sources", {}).items():
                self.agree_on_source(int(seed), str(source))
            for name, row in found["rows"].items():
                if name in variants and _same(row, variants[name]):
                    self._adopt_row(path.name, row, variants[name])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, AptError):
                raise
            raise AptError(f"{path} is not the ablations.json of an ablation: give one that is.") from error

    def _adopt_row(self, origin: str, row: dict, variant: Variant) -> None:
        for seed, figures in row["by_seed"].items():
            file = self.path(variant, int(seed))
            if not file.exists():
                facts = {"variant": variant.name, "seed": int(seed), "from": origin} | settings_of(variant)
                write_json(file, facts | {"failed": row["failed"].get(seed), "figures": figures})

    def _source(self, seed: int) -> Path:
        return self.out / f"identity-seed-{seed}.json"

    def _comparable(self, identity: dict) -> dict:
        """The identity without the preset's other recipes, on which no row depends; see `comparable`."""
        return identity | {"preset": comparable(identity["preset"], self.recipe)}


def plain(settings: BaseModel | None) -> dict | None:
    """Settings as JSON has them."""
    return None if settings is None else settings.model_dump(mode="json")


def settings_of(variant: Variant) -> dict:
    """What a row's figures depend on besides the ablation's own settings."""
    return {"settings": plain(variant.settings)} | (
        {"stage1": dict(variant.stage1)} if variant.stage1 else {}
    )


def read(path: Path) -> dict:
    """A file of the ablation. Raises AptError as `read_object` does."""
    return read_object(path, "delete it, and it is made again")


def _same(row: dict, variant: Variant) -> bool:
    """Whether an earlier table's row was made with the variant's settings."""
    if dict(variant.stage1) != row.get("stage1", {}):
        return False
    if variant.settings is None:
        return row["settings"] is None
    return Adversarial.model_validate(row["settings"]) == variant.settings


def _filled_in(row: dict) -> dict:
    """A row as this version would write it: settings that an earlier version did not have are filled in."""
    settings = row["settings"]
    return row | {"settings": settings and plain(Adversarial.model_validate(settings))}
