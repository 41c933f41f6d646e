"""What a label is called outside: a code, a side, a colour.

Codes are SNOMED CT as pydicom's dictionary of the standard's context groups lists them. A name that is not in the table
gets a code of a private scheme, `PRIVATE`, so that nobody takes it for more than a name.
"""

from __future__ import annotations

import colorsys
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fewscan.data.painting import plain_name

PRIVATE = "99FEWSCAN"
LONGEST_CODE, LONGEST_MEANING = 16, 64  # characters of the value representations SH and LO
NORMAL = """
    adrenal gland, amygdala, aorta, bile duct, bladder, bone, brain, brain stem, breast, calcaneus, carotid artery,
    cartilage, caudate nucleus, cerebellar cortex, cerebellum, cerebral cortex, cerebral white matter, clavicle, colon,
    corpus callosum, duodenum, esophagus, eye, femoral head, femur, fibula, gallbladder, globus pallidus, gray matter,
    heart, hepatic vein, hippocampus, humerus, ilium, inferior vena cava, kidney, larynx, lateral ventricle,
    left atrium, left ventricle, left ventricle myocardium, lens, liver, lower lobe of lung, lung, lymph node, mandible,
    maxilla, meniscus, middle lobe of right lung, muscle, nucleus accumbens, optic chiasm, optic nerve, pancreas,
    parotid gland, patella, pericardium, pharynx, portal vein, prostate, pulmonary artery, pulmonary vein, putamen,
    radius, rectum, rib, right atrium, right ventricle, sacrum, scapula, seminal vesicle, skin, skull, small intestine,
    spinal cord, spleen, sternum, stomach, subclavian artery, submandibular gland, superior vena cava, talus, thalamus,
    third ventricle, fourth ventricle, thyroid, tibia, tongue, trachea, ulna, upper lobe of lung, uterus, vertebra,
    white matter
"""
ABNORMAL = "abscess, cyst, edema, hematoma, hemorrhage, lesion, necrosis, neoplasm, nodule, pleural effusion, thrombus"
ALIASES = {
    "adrenal": "adrenal gland",
    "brainstem": "brain stem",
    "caudate": "caudate nucleus",
    "accumbens": "nucleus accumbens",
    "ivc": "inferior vena cava",
    "lung lower lobe": "lower lobe of lung",
    "lung upper lobe": "upper lobe of lung",
    "lung middle lobe right": "middle lobe of right lung",
    "lv": "left ventricle",
    "la": "left atrium",
    "ra": "right atrium",
    "rv": "right ventricle",
    "myocardium": "left ventricle myocardium",
    "oesophagus": "esophagus",
    "oedema": "edema",
    "haemorrhage": "hemorrhage",
    "pallidum": "globus pallidus",
    "parotid": "parotid gland",
    "small bowel": "small intestine",
    "thyroid gland": "thyroid",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "urinary bladder": "bladder",
}
SIDES = {"left": "Left", "l": "Left", "right": "Right", "r": "Right"}


class Code(NamedTuple):
    """A coded concept.

    Parameters
    ----------
    value, scheme, meaning : str
        Such as "10200004", "SCT" and "Liver".
    """

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A label as other programs need it.

    Parameters
    ----------
    value : int
        In the label map.
    name : str
        As the user gave it.
    kind : Code
        What it is.
    category : Code
        Whether that is anatomy or an abnormality.
    side : Code, optional
        Left or right, where the name says so.
    colour : (3,) int
        Red, green, blue, 0 to 255.
    """

    value: int
    name: str
    kind: Code
    category: Code
    side: Code | None
    colour: tuple[int, int, int]


def structures_of(names: Mapping[int, str]) -> list[Structure]:
    """Codes, sides and colours of labels, in the order of their values.

    Parameters
    ----------
    names : mapping of int to str
        Label value to name.

    Examples
    --------
    >>> kidney, thing = structures_of({1: "kidney_left", 2: "thing 7"})
    >>> kidney.kind.value, kidney.side.meaning
    ('64033007', 'Left')
    >>> thing.kind
    Code(value='thing-7', scheme='99FEWSCAN', meaning='thing 7')
    """
    from pydicom.sr.codedict import codes

    def listed(keyword: str) -> Code:
        code = getattr(codes.SCT, keyword)
        return Code(code.value, code.scheme_designator, code.meaning)

    normal, abnormal = _keywords(NORMAL), _keywords(ABNORMAL)
    known = normal | abnormal
    known |= {plain_name(alias): known[plain_name(name)] for alias, name in ALIASES.items()}
    known |= {
        plain_name(f"vertebrae {level}"): f"{level}Vertebra"
        for level in ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "L1", "L2", "L3", "L4", "L5"]
    }
    made = []
    for place, (value, name) in enumerate(sorted(names.items())):
        words = plain_name(name).split()
        side = next((SIDES[w] for w in words if w in SIDES), None)
        bare = " ".join(w for w in words if w not in SIDES)
        keyword = known.get(" ".join(words))
        if keyword is None:
            keyword = known.get(bare)
        elif side is not None:
            side = None  # the code says it: left ventricle
        sick = keyword in abnormal.values() or bool({*words} & {"tumor", "tumour", *_keywords(ABNORMAL)})
        made.append(
            Structure(
                value=value,
                name=name,
                kind=_private(name) if keyword is None else listed(keyword),
                category=listed("MorphologicallyAbnormalStructure" if sick else "AnatomicalStructure"),
                side=None if side is None else listed(side),
                colour=colour(place),
            )
        )
    return made


def colour(place: int) -> tuple[int, int, int]:
    """Red, green and blue of the n-th label: hues a golden angle apart, so that neighbours never look alike.

    Parameters
    ----------
    place : int
        From 0.

    Examples
    --------
    >>> colour(0), colour(1)
    ((230, 69, 69), (69, 116, 230))
    """
    red, green, blue = colorsys.hsv_to_rgb((place * 0.618034) % 1, 0.7, 0.9 - 0.25 * (place // 8 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def _keywords(listed: str) -> dict[str, str]:
    """Plain name to keyword of pydicom's dictionary."""
    found = (" ".join(name.split()) for name in listed.split(","))
    return {plain_name(name): "".join(word.capitalize() for word in name.split()) for name in found}


def _private(name: str) -> Code:
    value = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    if not 0 < len(value) <= LONGEST_CODE:
        value = f"{value[:7]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Code(value, PRIVATE, name[:LONGEST_MEANING])
