//! The presets.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{ScaleSearch, Scales};
use crate::error::Error;

/// How much is done for accuracy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quality {
    /// Plain GPTQ.
    Fast,
    /// What costs little beside it.
    #[default]
    Standard,
    /// All that was measured to help.
    Best,
}

/// What is done beyond plain GPTQ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Refinements {
    /// How the scale of a group is chosen.
    pub scales: Scales,
}

impl Quality {
    /// What the preset turns on.
    pub fn refinements(self) -> Refinements {
        let scales = match self {
            Self::Fast => Scales::PLAIN,
            Self::Standard => Scales { signed: true, search: ScaleSearch::Diagonal },
            Self::Best => Scales { signed: true, search: ScaleSearch::Block },
        };
        Refinements { scales }
    }
}

impl fmt::Display for Refinements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut on = Vec::new();
        if self.scales.signed {
            on.push("signed scales".to_owned());
        }
        if self.scales.search != ScaleSearch::Off {
            on.push(format!("scale search by {}", self.scales.search));
        }
        f.write_str(&if on.is_empty() { "plain GPTQ".to_owned() } else { on.join(", ") })
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fast => "fast",
            Self::Standard => "standard",
            Self::Best => "best",
        })
    }
}

impl FromStr for Quality {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        [Self::Fast, Self::Standard, Self::Best].into_iter().find(|q| q.to_string() == text).ok_or_else(
            || Error::Value {
                what: "quality".into(),
                expected: "fast, standard or best".into(),
                found: text.into(),
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_say_what_they_turn_on() {
        let said = [Quality::Fast, Quality::Standard, Quality::Best].map(|q| q.refinements().to_string());
        assert_eq!(
            said,
            ["plain GPTQ", "signed scales, scale search by diagonal", "signed scales, scale search by block",]
        );
        assert_eq!("best".parse::<Quality>().unwrap(), Quality::Best);
        assert!("good".parse::<Quality>().is_err());
    }
}
