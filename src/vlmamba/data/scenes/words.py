"""The words that can be written in a picture: common English ones of three to eight letters.

None of them is used in the wording of a question, so that a held-out word is never met in training at all.
"""

from __future__ import annotations

_LIST = """
ace act age ago aid aim air any arm art ask bad bay beg bet big bit bow boy bug cry cup cut dad day den dig dim dip
dry due dug eat era fan far fed few fig fit fix fly fog fun fur gap gas get gum gun had hay her hid him hip hit hop
hug hut ill ink inn jam jar jaw jet job jog joy jug kid kit lab lap law lay leg let lid lie lip log lot low mad man
map mat may met mix mob mom mud mug nap net new nod now nut oak oar oat off oil old our own pad pal pan pat paw pay
pea peg pen pet pie pit pop put rag ram ran rat raw ray rib rid rim rip rob rod rot rub rug run rye sad sat saw sea
set sew she shy sip sir sit ski sky sly sob son spy tan tap tar tax tea tin tip toe ton toy try tub tug use van vet
wag war wax way web wet who why win wit yet zip zoo able acid also army baby back bake barn bean belt bend bike bill
bite bold boss brag brew bump burn cafe cage card care case cash cast cave chat chin city clay coal coat code coin
cook copy core cost crew cube cure curl dark dawn dear deep deer desk dine dirt dish dock down draw dusk dust each
east easy echo edge else exit face fact fair fame farm fast feed feel file film firm flat flow foam folk form free
fuel game girl give glue gold golf good gray grew grip hair hall hawk hear help herb hero hill hint hole holy home
hood hope horn hour huge hunt idea inch iron item join joke jury just keen kick kiss knot lace lamb lamp late lead
life lift link live load loft long lord lose loud love luck lung made mail make mark mask mass meal mean meat melt
menu mild mile mill mind mine mint miss moss nail near neat neck news norm oath obey pack page pain pair past path
pick pipe play plum poem poet poor port post pull pump pure push rank rare real rely rent ride rise risk road rock
role room root rule safe salt save seal seat seed sell side silk sing sink site skin slow snow soap sock soft sold
solo song soon sort soul soup spin stay stem step such swim tail take talk tall tape task then thin tile time tiny
tool tour town trip tune turn twin type upon vary vast verb very vest vote wage wait wake walk wall want weak wear
week well when wife wild will wind wood wool yard actor adult again agent album alone angle apart arena baker basic
beach bench berry birth blade blank board bonus boost brand bread break brick bride brief broad bunch cable cargo
chase check cheek chess chief child climb close cloth coach coast comic coral court creek curve dairy dance dream
drift drink drive earth empty equal error event exact extra faith fancy fever fiber field flour fluid focus force
fresh frost funny giant grace grade grain grape graph great greet group guess habit heavy hello honor hotel humor
ideal inner ivory jewel judge juice knock laugh learn level limit linen loyal lucky magic major march match maybe
mercy meter mount movie never night noble ocean offer onion paint paper pasta peace pearl pedal photo place plain
plate porch press pride prime prize pulse purse quiet radar rapid ready roast robin rough route royal rural scout
sense shell shine silly skill skirt sleep slice slide smell smile smoke snack south space spare spark speed spice
sport staff stamp start steam stick still stone stove straw style taste thank theme think third throw title token
topic tough tower trade treat tribe trunk trust truth twist uncle union unity upper upset video visit vital wagon
waste woman world write wrong young youth zebra answer august autumn bakery before better border bottle branch breeze
bright broken bronze butter career chance cheese choice church circus client common copper cotton create custom decade
degree design dinner dollar double during effect effort energy escape estate family famous farmer father figure finger
finish flight flower forest forget format future galaxy garage garlic gentle global ground handle harbor health heroic
honest island jacket junior kettle kidney leader leaves legend lesson listen locket lounge manner marble master matter
meadow memory moment monday motion mutual nation nature nickel normal output parade people period picnic player pocket
poetry powder profit recipe record repair report rescue return rubber sailor salmon sample school screen search season
senior silver simple singer sister sketch soccer soften statue stream street string summer sunday supply symbol system
tennis ticket timber tongue travel treaty tunnel unique valley violet vision volume walnut window wisdom wonder wooden
worker account airport bargain benefit cabinet capital caution climate contest cottage country courage curtain cushion
deliver evening example explore fiction fishing fortune gallery gateway grammar gravity harvest heating history
lantern leather luggage machine medical mineral mystery nothing pancake partner passage patient pioneer quality
quarter reality regular respect sailing science section shelter silence society speaker special stomach storage
success theater thunder trouble vehicle village weather website wedding welcome western whisper birthday calendar
campaign creative daughter december delicate director distance hospital identity internet material medicine midnight
november painting pleasure positive powerful practice princess railroad reporter research schedule software southern
standard strategy sunlight together universe valuable vineyard
"""
WORDS: tuple[str, ...] = tuple(_LIST.split())
