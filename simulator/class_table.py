"""The product classes that can be drawn.

They are 42 subcategories of five classes each.
"""

CLASS_TABLE = """
fruit | pome fruit | round | punnet
gala apple=d8433b, granny smith apple=8cc63f, golden apple=e8cf4a, williams pear=c6d24e, quince=e9c62f
fruit | citrus | round | net
navel orange=f28c1e, lemon=f7df3c, lime=7fb82e, pink grapefruit=f29f80, clementine=f56f1d
fruit | berries | berry | punnet
strawberry=dd2638, blueberry=5a6fb8, raspberry=d83a6b, blackberry=7a5aa0, gooseberry=b5cc5a
fruit | stone fruit | round | crate
peach=f7a76c, plum=9a4f9a, apricot=f5a63d, cherry=c21f3a, nectarine=e8603c
fruit | tropical fruit | oval | crate
mango=f4a833, papaya=f0803c, kiwi=a9b84f, avocado=6b9a45, passion fruit=a0629c
fruit | bananas | crescent | crate
cavendish banana=f6d63a, baby banana=fbe36a, plantain=b8c83f, red banana=c85a4a, apple banana=f0c84a
fruit | grapes | berry | bag
green grapes=b6d465, red grapes=b8486e, black grapes=6e5a9a, muscat grapes=d8d268, pink grapes=e08fa0
fruit | melons | biground | crate
watermelon=4fa84a, honeydew melon=e0e68c, cantaloupe=e9b872, galia melon=d3b84f, charentais melon=c9c98a
vegetables | tomatoes | round | punnet
vine tomato=e03a2c, cherry tomato=f0503c, beef tomato=d8584a, yellow tomato=f5c836, green tomato=94b84a
vegetables | peppers | pepper | bag
red pepper=db2f2f, yellow pepper=f7cf2a, green pepper=4f9f45, orange pepper=f58a25, chili pepper=e84a3a
vegetables | roots | cone | bag
carrot=f08228, parsnip=ece0b4, beetroot=b04a78, radish=e85a84, turnip=d6b4d8
vegetables | potatoes | oval | net
waxy potato=e0c27a, red potato=cf7a72, sweet potato=de8052, baby potato=ead49a, purple potato=8a6fae
vegetables | onions | bulb | net
brown onion=d8a85a, red onion=a8487a, white onion=f0ecdc, shallot=d79a74, garlic=f2eade
vegetables | cabbages | biground | crate
white cabbage=cfe0a8, red cabbage=94588f, savoy cabbage=6fae5a, broccoli=5a9a4a, cauliflower=f2ead0
vegetables | leaves | leaf | bag
spinach=4f9a3c, rocket=7ab84a, iceberg lettuce=b4dc84, pak choi=8ccc6a, lollo rosso=b0557a
vegetables | squashes | oval | crate
zucchini=6a9a3e, pumpkin=ee8a2c, butternut squash=eebf86, aubergine=7f56a0, cucumber=58a050
vegetables | stalks | stalk | bowl
asparagus=86b04c, leek=a8cf7a, celery=bfdc84, rhubarb=dc5a74, spring onion=78bc5c
vegetables | mushrooms | mushroom | punnet
button mushroom=f0e8dc, chestnut mushroom=cfa680, oyster mushroom=dcd4c4, shiitake=c09468, king oyster mushroom=e9d6ae
vegetables | beans and peas | pod | bowl
green beans=62aa48, sugar snap peas=8cc850, garden peas=78c048, broad beans=b0cc78, edamame=9ab84c
vegetables | herbs | leaf | jar
basil=4aa848, parsley=5cb03c, mint=54c08a, coriander=88c04c, rosemary=6a9c78
dairy | milk | carton | bottle
whole milk=f4f4f8, skimmed milk=cfe4fa, oat drink=ecdcb4, soy drink=e4ecc8, almond drink=f0dcd0
dairy | yoghurt | tub | bowl
plain yoghurt=f6f2ec, strawberry yoghurt=f6a8b8, vanilla yoghurt=faeaa8, blueberry yoghurt=a8a8e0, peach yoghurt=fac898
dairy | cheese | wedge | box
gouda=f4c84c, cheddar=f2a03c, brie=f4ecd4, blue cheese=d0d8e8, feta=fafaf4
dairy | butter and cream | brick | box
salted butter=fae48c, unsalted butter=fcf0b4, whipping cream=fbf6ec, margarine=f8d464, sour cream=eef2f4
dairy | eggs | egg | box
white eggs=f6f2ea, brown eggs=dcaa80, quail eggs=d8d0b8, duck eggs=c8e0d8, cream eggs=f0dcb8
bakery | bread | loaf | bag
white loaf=f0d8a4, rye loaf=c89c6c, sourdough loaf=e4bc80, corn loaf=f6d870, seeded loaf=d8b078
bakery | rolls and buns | bun | box
sesame bun=eabf74, milk roll=f8dca0, pretzel roll=cc8a58, raisin bun=dcae80, matcha bun=b4cc80
bakery | cakes | wedge | box
lemon cake=fae47c, carrot cake=e8a868, cherry cake=e87c8c, matcha cake=a8cc74, berry cake=c890d0
meat and fish | poultry | drumstick | box
chicken legs=f2c8a0, chicken breast=f8d4c0, turkey legs=e8b498, duck breast=dc8c80, chicken wings=f4bc84
meat and fish | red meat | steak | box
beef steak=cc4848, pork chop=f0a0a0, lamb chop=dc7070, minced beef=e0605c, veal steak=eeb0a8
meat and fish | fish | fish | crate
salmon=f8906c, trout=b0b8b0, sea bream=dcc8d0, mackerel=88a8c8, cod=e4e4dc
meat and fish | shellfish | crescent | bowl
shrimp=f8a48c, king prawn=f07c6c, crab claw=e85c48, crayfish=d84c3c, mussel=7088a8
drinks | juice | carton | bottle
orange juice=f8a02c, apple juice=e8d05c, grape juice=9a5cae, tomato juice=dc4c3c, pineapple juice=f6e04c
drinks | water and soda | pet | bottle
still water=bcdcf4, cola=b85c50, lemon soda=e4f06c, ginger ale=e4c478, tonic water=a4d4dc
drinks | tea and coffee | can | jar
green tea=8cb868, black tea=d08848, herbal tea=c8d48c, ground coffee=b48868, iced coffee=d8b494
pantry | pasta and noodles | stalk | bag
spaghetti=f4d880, egg noodles=f8e0a0, glass noodles=e4e8e8, spinach pasta=a8c468, udon=f6eedc
pantry | rice and grains | brick | jar
jasmine rice=f6f4ec, brown rice=d8bc8c, red lentils=ee9460, chickpeas=e8cc90, bulgur=dcb468
pantry | tins | can | box
tinned corn=f8d844, tinned tomatoes=dc4438, tinned tuna=7cb0d8, kidney beans=b04c5c, coconut milk=e8ecec
pantry | oils and sauces | pet | bottle
olive oil=b8b83c, sunflower oil=f6d848, soy sauce=a07060, ketchup=dc3030, chili oil=e86428
snacks | sweets | star | jar
fruit gums=e85cb0, mint drops=9cdcc8, caramels=d8984c, liquorice=7c7c94, jelly stars=6cc0f0
snacks | nuts and crisps | berry | bag
peanuts=dcb070, cashews=eed8ac, pistachios=b0c470, potato crisps=f4d060, paprika crisps=ec7c3c
household | cleaning | pet | box
dish soap=60c864, laundry liquid=6098e8, glass cleaner=68d0e8, bleach=f0f0e0, floor cleaner=e878c8
"""
"""Two lines per subcategory: category | subcategory | piece shape | container, then noun=colour (RGB in hex), ..."""
