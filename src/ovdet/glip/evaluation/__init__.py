"""How GLIP is judged: fixed AP of LVIS, recall of Flickr30k Entities, averages of ODinW."""
