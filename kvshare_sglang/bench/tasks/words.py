"""The words that tasks are made of: closed sets, each word one token of the reader."""

PEOPLE = (
    "Ana Ben Cara Dan Eve Finn Gus Hana Ivan Jo Kim Leo Mia Ned Ola Pam Quin Ros Sam Tia Uma Vic "
    "Wes Xan Yara Zed Abe Bea Cy Dot Eli Fay Gil Ida Jon Kay Lou Max Nia Oz"
).split()
THINGS = (
    "tower garden harbor bridge castle forest island market museum station temple valley village "
    "window library kitchen engine ladder mirror river mill farm barn cabin cave chapel church "
    "cinema clinic college court dam depot dock factory field fort fountain gallery garage gate "
    "hall hangar hotel inn lake lab lodge manor mine office orchard palace park pier plant plaza "
    "pond port prison quarry ranch road school shed shop stable store street studio tavern tent "
    "theater tomb track tunnel vault villa wall warehouse well wharf yard zoo"
).split()
ROLES = "captain doctor pilot judge baker singer".split()
SIGNS = "star moon cross arrow circle square wave crown flame leaf".split()
MEANINGS = "closed open empty full danger safe hot cold wet dry sold free".split()
UNITS = "pounds kilos tons grams stones ounces".split()
LABELS = "dax wug fep blick toma zup kiv lorp mip nool pim rell sarn tiv vash yop".split()
CATEGORIES = {
    "animal": "otter lion horse goat sheep wolf bear mouse rabbit tiger".split(),
    "fruit": "pear apple grape lemon cherry peach plum mango melon fig".split(),
    "tool": "hammer saw drill axe wrench pliers shovel rake chisel knife".split(),
    "cloth": "shirt coat scarf glove hat sock shoe belt dress skirt".split(),
    "color": "red blue green yellow purple orange brown pink gray black".split(),
    "music": "piano violin flute drum guitar harp cello trumpet horn banjo".split(),
    "body": "arm leg nose ear knee elbow foot hand neck chin".split(),
    "vehicle": "truck car bus train boat ship bike plane sled wagon".split(),
}
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}
NUMBERS = [str(n) for n in range(10, 100)]
TITLES = "Report Letter Note Memo Story Record".split()
