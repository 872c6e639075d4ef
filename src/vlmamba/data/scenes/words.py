"""The words that can be written in a picture: common English ones of three to eight letters."""

from __future__ import annotations

_LIST = """
ace act add age ago aid aim air all and any arm art ask bad bag bar bay beg bet big bit bow boy bug can cry cup cut
dad day den dig dim dip dry due dug eat end era fan far fed few fig fit fix fly fog fun fur gap gas get gum gun had
has hay her hid him hip hit hop hot how hug hut ill ink inn jam jar jaw jet job jog joy jug kid kit lab lap law lay
leg let lid lie lip log lot low mad man map mat may met mix mob mom mud mug nap net new nod not now nut oak oar oat
odd off oil old one our out own pad pal pan pat paw pay pea peg pen pet pie pit pop pot put rag ram ran rat raw ray
rib rid rim rip rob rod rot row rub rug run rye sad sat saw say sea set sew she shy sip sir sit six ski sky sly sob
son spy tan tap tar tax tea ten tin tip toe ton top toy try tub tug two use van vet wag war wax way web wet who why
win wit yes yet you zip zoo able acid also army baby back bake barn bean belt bend bike bill bite bold boss brag brew
bulb bump burn cafe cage card care cart case cash cast cave chat chin city clay coal coat code coin cook copy core
cost crew cube cure curl dark dawn dear deep deer desk dine dirt dish dock down draw dusk dust each east easy echo
edge else exit face fact fair fame farm fast feed feel file film firm five flat flow foam folk form four free fuel
game girl give glue gold golf good gray grew grid grip hair hall hawk hear help herb hero hill hint hold hole holy
home hood hope horn hour huge hunt idea inch iron item join joke jury just keen kick kind kiss knot lace lamb lamp
last late lead left life lift link list live load loft long look lord lose loud love luck lung made mail make many
mark mask mass meal mean meat melt menu mild mile mill mind mine mint miss more moss nail near neat neck news next
nine norm oath obey pack page pain pair part past path pick pipe play plum poem poet poor port post pull pump pure
push rank rare read real rely rent ride rise risk road rock role room root rule safe salt save seal seat seed sell
show side sign silk sing sink site skin slow snow soap sock soft sold solo song soon sort soul soup spin stay stem
step such swim tail take talk tall tape task tell text than then thin tile time tiny tool tour town trip tune turn
twin type upon vary vast verb very vest vote wage wait wake walk wall want weak wear week well when wife wild will
wind wine wood wool work yard actor adult again agent alarm album alone angle apart arena baker basic beach begin
below bench berry birth blade blank board bonus boost brand bread break brick bride brief broad bunch cable cargo
chase check cheek chess chief child climb close cloth coach coast color comic coral count court creek curve dairy
dance dream drift drink drive earth empty equal error event exact extra faith fancy fever fiber field first flour
fluid focus force fresh frost funny giant glass glove grace grade grain grape graph great greet group guess habit
heavy hello honey honor hotel humor ideal inner ivory jewel judge juice knock label large laugh learn level light
limit linen loyal lucky magic major march match maybe mercy meter mount movie never night noble ocean offer onion
paint paper pasta peace pearl pedal photo piece place plain plate porch press pride prime print prize pulse purse
quiet radar rapid ready roast robin rough route royal rural scout sense seven shell shine shoes silly skill skirt
sleep slice slide small smell smile smoke snack south space spare spark speed spice sport staff stamp stand start
steam stick still stone stove straw style taste thank theme thing think third throw title token topic tough tower
trade treat tribe trunk trust truth twist uncle union unity upper upset value video visit vital wagon waste wheel
woman world write wrong young youth zebra answer august autumn bakery before better border bottle bottom branch breeze
bright broken bronze butter career chance cheese choice church circus client common copper cotton create custom decade
degree design dinner dollar double during effect effort energy engine escape estate family famous farmer father figure
finger finish flight flower forest forget format future galaxy garage garlic gentle global ground handle harbor health
heroic honest island jacket junior kettle kidney leader leaves legend lesson letter listen locket lounge manner marble
master matter meadow memory middle moment monday motion mutual nation nature nickel normal number object output parade
people period picnic player pocket poetry powder profit puzzle recipe record repair report rescue return rubber sailor
salmon sample school screen search season second senior silver simple singer sister sketch soccer soften statue stream
street string summer sunday supply symbol system tennis ticket timber tongue travel treaty tunnel unique valley violet
vision volume walnut window wisdom wonder wooden worker account airport bargain benefit cabinet capital caution
climate contest cottage country courage curtain cushion deliver evening example explore fiction fishing fortune
gallery gateway grammar gravity harvest heating history lantern leather luggage machine medical mineral mystery
nothing pancake partner passage patient picture pioneer quality quarter reality regular respect sailing science
section shelter silence society speaker special stomach storage success theater thunder traffic trouble vehicle
village weather website wedding welcome western whisper birthday calendar campaign creative daughter december delicate
director distance hospital identity internet material medicine midnight november painting pleasure positive powerful
practice princess railroad reporter research schedule software southern standard strategy sunlight together universe
valuable vineyard
"""
WORDS: tuple[str, ...] = tuple(_LIST.split())
