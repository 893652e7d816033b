"""What the facts of the `retrieval` evaluation are made of: plain English words, most of them one token with a space."""

_NOUNS = """
    apple arrow badge baker barrel basket beach bell bench bird blade board boat bone book boot bottle bowl box branch
    bread brick bridge brush bucket button cabin cable cake camera candle canoe card carpet castle cave chain chair chalk
    cherry circle clock cloud coal coat coin corn cotton crown cup curtain dance desk diamond dish doctor dog door dragon
    dream dress drum eagle engine farmer feather fence field finger fire flag flame flower fork forest fox frog fruit
    garden gate ghost glass glove gold goose grape guitar hammer harbor hat hill honey horse hotel house island jacket
    jewel key king kitchen knife ladder lake lamp leaf lemon letter lion lock log map marble market mask meadow metal milk
    mirror moon moth mountain mouse needle nest net oak ocean onion orange oven owl paint palace panel paper pencil pepper
    piano picture pilot pipe planet plate pocket pond poster potato pump puzzle queen rabbit radio rain ribbon rice ring
    river road robot rocket roof rope rose sail salt sand scarf school shadow sheep shell ship shirt shoe shovel silk
    silver singer smoke snake snow soap spider spoon spring star statue stone storm stove sugar sword table tail temple
    tent ticket tiger tower trail train tree truck tunnel turtle valley violin wagon wall water wheel whistle window wolf
    wood wool yard"""
_ADJECTIVES = """
    ancient big black blue bright broken brown clean cold dark deep dry empty golden great green grey heavy high hidden
    large light little long lost narrow new old open painted pink plain purple quiet red round royal secret sharp short
    silent small soft square strange tall thin tiny warm white wide wild wooden yellow young"""
_CITIES = """
    Amsterdam Athens Barcelona Berlin Boston Cairo Chicago Copenhagen Dallas Delhi Denver Dublin Florence Geneva Hamburg
    Houston Istanbul Jerusalem Lima Lisbon London Madrid Manchester Melbourne Miami Milan Moscow Munich Naples Oslo Paris
    Philadelphia Prague Rome Santiago Seattle Shanghai Singapore Stockholm Sydney Tokyo Toronto Vancouver Venice Vienna
    Warsaw Zurich"""
NOUNS, ADJECTIVES, CITIES = (tuple(x.split()) for x in (_NOUNS, _ADJECTIVES, _CITIES))
