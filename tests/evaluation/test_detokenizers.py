"""Detokenizers are lossless: joined lines can be restored, to the last space."""

import random

import pytest

from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks.detokenizers import ONE_BILLION, PTB, WIKITEXT, Detokenizer

# Lines in WikiText's and the Penn Treebank's manner, with what is hard about them.
WIKITEXT_LINES = [
    " = <unk> Castle = ",
    " ",
    ' The castle ( built 1 @,@ 204 feet above the sea , or 3 @.@ 5 km ) was " a ruin " by 1650 . ',
    " Its well @-@ known keep is John 's , the steward 's men 's and the lords ' , wasn 't it ? ",
    ' He said : " It is not mine ! " ; the U.S. envoy , Mr. Hay , said " No . " ',
    " From c . 1200 \u2013 1300 the tower [ sic ] cost £ 30 , $ 5 @.@ 50 or 10 % more ... ",
    ' " Quotes that do not end , he wrote . ',
    " = = Etymology = = ",
    " A.V. Club rated it B. ; see e.g. Co. records , pp. 3 \u2013 4 . ",
    ' The " " empty ones , and a - dash , @-@ alone , and ( parens ( nested ) ) . ',
]
PTB_LINES = [
    " no it was n't black monday ",
    " but while the new york stock exchange did n't fall apart friday as the dow jones industrial "
    "average plunged N points most of it in the final hour it barely managed to stay this side of "
    "chaos ",
    " the company 's shares rose $ N to $ N or N N % a share they 're told ",
    " <unk> 's partners ' they 'll say i 'm we 've he 'd ",
]


@pytest.mark.parametrize(
    ("rules", "lines"),
    [(WIKITEXT, WIKITEXT_LINES), (ONE_BILLION, WIKITEXT_LINES), (PTB, PTB_LINES)],
)
def test_every_line_can_be_restored(rules, lines):
    detokenizer = Detokenizer.for_lines(rules, lines)
    for line in lines:
        assert detokenizer.restore(detokenizer.join(line)) == line


def test_lines_read_as_people_write():
    detokenizer = Detokenizer.for_lines(WIKITEXT, WIKITEXT_LINES)
    joined = [detokenizer.join(line) for line in WIKITEXT_LINES]
    assert joined[2] == (
        'The castle (built 1,204 feet above the sea, or 3.5 km) was "a ruin" by 1650.'
    )
    assert joined[3].startswith(
        "Its well-known keep is John's, the steward's men's and the lords',"
    )
    assert joined[4] == 'He said: "It is not mine!"; the U.S. envoy, Mr. Hay, said "No."'
    detokenizer = Detokenizer.for_lines(PTB, PTB_LINES)
    assert detokenizer.join(PTB_LINES[0]) == "no it wasn't black monday"
    assert "$N to $N or N N% a share they're told" in detokenizer.join(PTB_LINES[2])


def test_what_is_not_tokenized_is_refused():
    with pytest.raises(UserError, match="space around each"):
        Detokenizer.for_lines(WIKITEXT, []).join("Two  spaces .")


@pytest.mark.parametrize("rules", [WIKITEXT, PTB, ONE_BILLION], ids=["wikitext", "ptb", "1bw"])
def test_any_tokens_can_be_restored(rules):
    """Also tokens that are made of marks: they stay apart where they must."""
    generator = random.Random(1)
    pieces = ["a", "St.", "U.S.", "1", "(", ")", ",", ".", "'s", "n't", '"', "@-@", "@,@", "-", "$"]
    pieces += ["''", "'", "...", "x-y", "1,000", "%", "<unk>", "can't", '"x', "x(", ":", "@", "é"]
    lines = [
        " " + "".join(f"{generator.choice(pieces)} " for _ in range(generator.randrange(12)))
        for _ in range(3000)
    ]
    detokenizer = Detokenizer.for_lines(rules, lines)
    for line in lines:
        assert detokenizer.restore(detokenizer.join(line)) == line
