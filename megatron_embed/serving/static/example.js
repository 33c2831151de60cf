// Texts to try the page with before one's own.

export const QUERIES = [
  "how do plants turn light into sugar",
  "my bread is stale the next day",
  "Warum ist der Himmel blau?",
  "怎样让自行车链条不生锈",
];

export const TEXTS = [
  "Leaves catch sunlight with chlorophyll and build sugar from water and carbon dioxide.",
  "A loaf keeps fresh longer in a cloth bag than in the fridge, where starch hardens quickly.",
  "Air scatters short waves of light more than long ones, so daylight looks blue from every side.",
  "Wipe a bicycle chain dry after rain and put a drop of oil on every link, or it will rust.",
  "Solar panels turn light into electric current without any moving part.",
  "Sourdough rises by wild yeast and bacteria that live in a mixture of flour and water.",
  "At sunset light crosses more air, the blue is scattered away and red is left.",
  "Change the brake pads of a bicycle when their grooves are no longer to be seen.",
  "Mushrooms have no chlorophyll; they live on what plants have made before.",
  "Frozen slices of bread go straight into the toaster and taste as on the first day.",
  "A rainbow appears opposite the sun when its light is broken in drops of rain.",
  "Tyres lose air slowly through the rubber; pump them up once a month.",
  "Der Himmel erscheint blau, weil Luft kurzwelliges Licht stärker streut als langwelliges.",
  "Altbackenes Brot wird wieder weich, wenn man es anfeuchtet und kurz aufbäckt.",
  "植物通过光合作用把水和二氧化碳变成糖和氧气。",
  "雨后擦干链条并上油，可以防止自行车生锈。",
  "Le pain rassis retrouve sa souplesse après quelques minutes dans un four humide.",
  "La chlorophylle absorbe surtout la lumière rouge et bleue.",
  "A heat pump takes warmth from cold air outside and brings it into the house.",
  "Noise-cancelling headphones play the opposite wave of the sound around you.",
  "The tide follows the moon, which pulls harder on the near side of the sea.",
  "Cats land on their feet because they twist their spine while falling.",
  "Salt lowers the freezing point of water, which keeps winter roads free of ice.",
  "An index of a database finds a row without reading the whole table.",
];

export const PAIRS = [
  "Leaves build sugar from sunlight.",
  "植物利用阳光制造糖分。",
  "Solar panels turn light into current.",
  "Brot bleibt in einem Tuch länger frisch.",
  "A loaf keeps fresh in a cloth bag.",
  "Oil the chain of your bicycle.",
];
