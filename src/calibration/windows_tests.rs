//! Windows of texts of both kinds.

use super::*;
use crate::calibration::test_support::{demo_tokenizer, test_data};
use crate::calibration::{Corpus, CorpusSource, SourceOptions, Tokenizer};
use crate::chat::ChatTemplate;

fn counting(count: u32) -> Tokens<'static> {
    Tokens::from_ids("mine", (0..count).collect(), count as usize).unwrap()
}

fn starts(windows: &Windows) -> Vec<i64> {
    (0..windows.count()).map(|index| windows.window(index)[0]).collect()
}

/// A corpus sampled by documents of these lengths in words.
fn documents(lengths: &[usize]) -> Corpus {
    let folder = tempfile::tempdir().unwrap();
    let line = |(row, words): (usize, &usize)| {
        let text: String = (0..*words).map(|word| format!("word {row} {word} ")).collect();
        format!("{{\"text\": \"{text}\"}}\n")
    };
    let recipe = "repository = 'a/b'\nrevision = 'main'\nconfig = ''\nsplit = 'train'\nfiles = ['x.jsonl']\n\
                  text_column = 'text'\nsampling = 'documents'\nevaluate = 'wikitext2-test'\n";
    std::fs::write(folder.path().join("pages.toml"), recipe).unwrap();
    let lines: String = lengths.iter().enumerate().map(line).collect();
    std::fs::write(folder.path().join("x.jsonl"), lines).unwrap();
    let options = SourceOptions { roots: vec![folder.path().into()], ..Default::default() };
    let path = folder.path().join("pages.toml");
    CorpusSource::resolve(path.to_str().unwrap(), &options).unwrap().load(None).unwrap()
}

/// The expected starts were made with an independent ChaCha8 in Python, from the rule in
/// `Windows::random`.
#[test]
fn random_starts_are_fixed() {
    let windows = Windows::random(&counting(1000), 8, 10, 0).unwrap();
    assert_eq!(starts(&windows), STARTS_SEED_0);
    assert_eq!((windows.count(), windows.seq_len(), windows.ids().len()), (8, 10, 80));
    assert!((0..8).all(|index| windows.window(index).windows(2).all(|pair| pair[1] == pair[0] + 1)));
    assert_eq!(starts(&Windows::random(&counting(1000), 8, 10, u64::MAX).unwrap()), STARTS_SEED_MAX);
}

const STARTS_SEED_0: [i64; 8] = [501, 160, 618, 117, 926, 8, 518, 817];
const STARTS_SEED_MAX: [i64; 8] = [955, 339, 377, 467, 797, 439, 957, 553];

/// Also from Python; with this bound nearly every second draw is thrown away.
#[test]
fn draws_at_the_top_are_repeated() {
    let mut draws = Draws::new(1, 0);
    let bound = (1 << 63) + 1;
    let drawn = [(); 3].map(|()| draws.below(bound) as u64);
    assert_eq!(drawn, [7_037_237_572_835_827_407, 5_440_448_899_038_119_230, 2_567_501_368_458_013_526]);
}

#[test]
fn the_digest_is_that_of_the_ids() {
    let tokens = Tokens::from_ids("mine", vec![1, 0x0102, 3, 4], 1000).unwrap();
    let windows = Windows::sequential(&tokens, 2, None).unwrap();
    let mut hasher = Sha256::new();
    hasher.update([1, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(windows.digest(), hex(&hasher.finalize()));
}

#[test]
fn both_ends_of_the_text_are_drawn() {
    let windows = Windows::random(&counting(12), 4, 10, 3).unwrap();
    let all: Vec<_> =
        (0..64).flat_map(|seed| starts(&Windows::random(&counting(12), 4, 10, seed).unwrap())).collect();
    assert!([0, 1, 2].iter().all(|start| all.contains(start)));
    assert!(all.iter().all(|start| *start <= 2));
    assert_eq!(windows, Windows::random(&counting(12), 4, 10, 3).unwrap());
    // A text of one window's length has one start.
    assert_eq!(starts(&Windows::random(&counting(10), 4, 10, 7).unwrap()), [0; 4]);
}

#[test]
fn distinct_tokens_are_counted_once() {
    // What the windows cover, position by position.
    for (count, samples, seq_len) in [(143, 4, 128), (1000, 8, 10), (320, 128, 10), (10, 4, 10)] {
        let windows = Windows::random(&counting(count), samples, seq_len, 0).unwrap();
        let covered: std::collections::BTreeSet<i64> = windows.ids().iter().copied().collect();
        assert_eq!(windows.distinct(), covered.len(), "{count} tokens, {samples} x {seq_len}");
    }
    assert_eq!(Windows::strided(&counting(35), 10, 4, None).unwrap().distinct(), 34);
    assert_eq!(Windows::sequential(&counting(35), 10, None).unwrap().distinct(), 30);
}

#[test]
fn too_little_text_is_an_error_with_the_numbers() {
    let random =
        |count, samples, seq_len| Windows::random(&counting(count), samples, seq_len, 0).unwrap_err();
    assert_eq!(
        random(9, 1, 10).to_string(),
        "mine has 9 tokens; the windows (1 of 10 tokens) need at least 10"
    );
    assert_eq!(
        random(319, 128, 10).to_string(),
        "mine has 319 tokens; the windows (128 of 10 tokens) need at least 320"
    );
    assert!(Windows::random(&counting(320), 128, 10, 0).is_ok());
    assert_eq!(random(9, 0, 10).to_string(), "samples: expected at least 1, found `0`");
    assert_eq!(random(9, 1, 0).to_string(), "sequence length: expected at least 1, found `0`");

    let sequential = Windows::sequential(&counting(9), 10, None).unwrap_err();
    assert_eq!(sequential.to_string(), "mine has 9 tokens; the windows (1 of 10 tokens) need at least 10");
    let none = Windows::sequential(&counting(9), 3, Some(0)).unwrap_err();
    assert_eq!(none.to_string(), "windows: expected at least 1, found `0`");
}

#[test]
fn sequential_windows_follow_each_other() {
    let all = Windows::sequential(&counting(35), 10, None).unwrap();
    assert_eq!(starts(&all), [0, 10, 20]);
    assert_eq!(starts(&Windows::sequential(&counting(35), 10, Some(2)).unwrap()), [0, 10]);
    assert_eq!(Windows::sequential(&counting(35), 10, Some(9)).unwrap(), all);
}

#[test]
fn strided_windows_score_every_token_once() {
    let windows = Windows::strided(&counting(35), 10, 4, None).unwrap();
    assert_eq!(starts(&windows), [0, 4, 8, 12, 16, 20, 24]);
    let scored = |index: usize| windows.window(index)[windows.first_scored(index)..].to_vec();
    let all: Vec<i64> = (0..windows.count()).flat_map(scored).collect();
    assert_eq!(all, (1..34).collect::<Vec<_>>());
    let limited = Windows::strided(&counting(35), 10, 4, Some(2)).unwrap();
    assert_eq!((starts(&limited), limited.stride()), (vec![0, 4], 4));
    let apart = Windows::sequential(&counting(35), 10, None).unwrap();
    assert_eq!([0, 1, 2].map(|index| apart.first_scored(index)), [1; 3]);
    let refused = |stride| Windows::strided(&counting(35), 10, stride, None).unwrap_err().to_string();
    assert_eq!(refused(11), "stride: expected 1 to 10, the tokens of a window, found `11`");
    assert_eq!(refused(0), "stride: expected 1 to 10, the tokens of a window, found `0`");
}

#[test]
fn a_window_longer_than_the_context_is_refused() {
    assert!(check_seq_len(2048, 2048).is_ok());
    assert_eq!(
        check_seq_len(4096, 2048).unwrap_err().to_string(),
        "sequence length 4096 is above the model's max_position_embeddings 2048"
    );
    assert!(check_seq_len(0, 2048).is_err());
}

#[test]
fn documents_give_one_window_each() {
    let (corpus, tokenizer) = (documents(&[3, 40, 50, 0, 60, 2]), demo_tokenizer());
    let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
    assert_eq!(tokens.count(), None);
    let windows = Windows::random(&tokens, 3, 100, 5).unwrap();
    assert_eq!(windows, Windows::random(&tokens, 3, 100, 5).unwrap());
    let texts: Vec<Vec<u32>> = corpus.rows().map(|row| tokenizer.encode(row).unwrap()).collect();
    let mut from: Vec<_> = (0..3)
        .map(|index| {
            let window: Vec<u32> = windows.window(index).iter().map(|id| *id as u32).collect();
            texts.iter().position(|text| text.windows(100).any(|part| part == window)).unwrap()
        })
        .collect();
    from.sort_unstable();
    assert_eq!(from, [1, 2, 4]);

    assert_eq!(
        Windows::random(&tokens, 4, 100, 5).unwrap_err().to_string(),
        "samples: expected at most 3, the documents of pages (of 6) with more than 100 tokens, found `4`"
    );
    assert!(matches!(
        Windows::random(&Tokens::new(&corpus, &tokenizer, 100).unwrap(), 1, 100, 5),
        Err(Error::TokenOutOfRange { .. })
    ));
}

#[test]
fn documents_follow_each_other_in_sequence() {
    let (corpus, tokenizer) = (documents(&[3, 40, 50]), demo_tokenizer());
    let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
    let ids: Vec<i64> = corpus.rows().flat_map(|row| tokenizer.encode(row).unwrap()).map(i64::from).collect();
    let windows = Windows::sequential(&tokens, 20, Some(4)).unwrap();
    assert_eq!((windows.count(), windows.ids()), (4, &ids[..80]));
    let all = Windows::sequential(&tokens, 20, None).unwrap();
    assert_eq!(all.ids(), &ids[..ids.len() / 20 * 20]);
    assert!(matches!(Windows::sequential(&tokens, 10_000, None), Err(Error::TooLittleText { .. })));
}

/// The windows of the reference perplexities: one BOS, at the very front.
#[test]
fn evaluation_windows_start_with_one_bos_with_test_data() {
    let Some(data) = test_data() else { return };
    let tokenizer = Tokenizer::open(&data.join("booklm")).unwrap();
    let path = data.join("books/eval.parquet");
    let corpus =
        CorpusSource::resolve(path.to_str().unwrap(), &SourceOptions::default()).unwrap().load(None).unwrap();
    let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
    let windows = Windows::sequential(&tokens, 1024, Some(16)).unwrap();
    assert_eq!((windows.count(), windows.ids().iter().filter(|id| **id == 1).count()), (16, 1));
    assert_eq!(windows.ids()[0], 1);
}

/// A chat dataset with one message a row, of these numbers of words.
fn conversations(lengths: &[usize]) -> Corpus {
    let folder = tempfile::tempdir().unwrap();
    let line = |(row, words): (usize, &usize)| {
        let text: String = (0..*words).map(|word| format!("word {row} {word} ")).collect();
        format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"{text}\"}}]}}\n")
    };
    let path = folder.path().join("chat.jsonl");
    std::fs::write(&path, lengths.iter().enumerate().map(line).collect::<String>()).unwrap();
    let template = ChatTemplate::of("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}");
    let source = CorpusSource::resolve(path.to_str().unwrap(), &SourceOptions::default()).unwrap();
    source.load(Some(&template)).unwrap()
}

#[test]
fn conversations_are_drawn_whole_and_have_no_second_bos() {
    let (corpus, tokenizer) = (conversations(&[10, 20, 30, 40]), demo_tokenizer());
    let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
    let rows: Vec<Vec<i64>> = corpus
        .rows()
        .map(|row| tokenizer.encode_rendered(row).unwrap().into_iter().map(i64::from).collect())
        .collect();
    assert!(rows.iter().all(|row| row[0] == 1 && row.iter().filter(|id| **id == 1).count() == 1));

    let windows = Windows::random(&tokens, 4, 50, 3).unwrap();
    assert_eq!(windows, Windows::random(&tokens, 4, 50, 3).unwrap());
    let ids = windows.ids();
    let first = rows.iter().find(|row| ids.starts_with(row)).expect("a whole conversation comes first");
    assert!(rows.iter().any(|row| row != first && ids[first.len()..].starts_with(&row[..5])));
    let all: usize = rows.iter().map(Vec::len).sum();
    assert!(matches!(Windows::random(&tokens, all / 50 + 1, 50, 3), Err(Error::TooLittleText { .. })));

    // To be evaluated on they follow each other in their order.
    let sequential = Windows::sequential(&tokens, 50, Some(2)).unwrap();
    assert_eq!(sequential.ids(), &rows.concat()[..100]);
}

#[test]
fn mixed_windows_keep_their_proportions_from_the_front() {
    let high = Tokens::from_ids("high", (500..1000).collect(), 1000).unwrap();
    let low = counting(400);
    let mixed = Windows::mixed(&[(&low, 6), (&high, 2)], 10, 7).unwrap();
    let from_high: Vec<bool> = starts(&mixed).iter().map(|&start| start >= 500).collect();
    assert_eq!(from_high, [false, false, true, false, false, false, true, false]);
    // The first text is drawn as it is alone, the second by other draws.
    let alone = starts(&Windows::random(&low, 6, 10, 7).unwrap());
    let own: Vec<i64> = starts(&mixed).into_iter().filter(|&start| start < 500).collect();
    assert_eq!(own, alone);
    let second = starts(&Windows::mixed(&[(&low, 1), (&low, 1)], 10, 7).unwrap());
    assert_ne!(second[0], second[1]);
}

#[test]
fn shares_follow_weights() {
    assert_eq!(shares(&[1], 128).unwrap(), [128]);
    assert_eq!(shares(&[64, 64], 128).unwrap(), [64, 64]);
    assert_eq!(shares(&[3, 1], 128).unwrap(), [96, 32]);
    assert_eq!(shares(&[1, 1, 1], 8).unwrap(), [3, 3, 2]);
    assert_eq!(
        shares(&[100, 1], 8).unwrap_err().to_string(),
        "samples: expected a window at least of each dataset; use more samples, or weights that are nearer to each other, \
         found `8`"
    );
}
