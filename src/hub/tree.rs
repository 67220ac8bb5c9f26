//! The Hub's listings: the files of a commit with their digests, and the commits of a branch.
//!
//! Asked for here and not through the client, which leaves out the digests of large files.

use reqwest::{Url, header::LINK};
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    answer::Problem,
    client::{About, Hub},
    digest::ContentId,
    transfer::Listed,
};
use crate::{
    error::{HubError, Result},
    folder::leads_down,
};

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    oid: String,
    lfs: Option<Large>,
}

/// What the Hub says of a file that git holds only a pointer to.
#[derive(Deserialize)]
struct Large {
    oid: String,
    size: u64,
}

#[derive(Deserialize)]
struct CommitEntry {
    id: String,
}

impl Hub {
    /// All files of a revision.
    pub(super) async fn list(&self, about: &About<'_>, revision: &str) -> Result<Vec<Listed>> {
        let entries: Vec<Entry> = self.pages(about, "tree", revision).await?;
        let mut files = Vec::new();
        for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
            let (size, id) = match entry.lfs {
                Some(large) => (large.size, ContentId::Sha256(large.oid)),
                None => (entry.size, ContentId::GitBlob(entry.oid)),
            };
            if !id.is_well_formed() {
                let action = format!("say the digest of `{}` of {}", entry.path, about.reference);
                let message = format!("it says `{}`", id.hex());
                return Err(HubError::Answer { action, message }.into());
            }
            if !leads_down(&entry.path) {
                let action = format!("list the files of {}", about.reference);
                let message = format!("it names `{}`, which is not below the repository", entry.path);
                return Err(HubError::Answer { action, message }.into());
            }
            files.push(Listed { path: entry.path, size, id });
        }
        Ok(files)
    }

    /// The first commit of a revision; none when there are no commits.
    pub(super) async fn first_commit(&self, about: &About<'_>, revision: &str) -> Result<Option<String>> {
        // The newest comes first.
        let commits: Vec<CommitEntry> = self.pages(about, "commits", revision).await?;
        Ok(commits.into_iter().next_back().map(|commit| commit.id))
    }

    /// Everything that a listing has, page by page.
    async fn pages<T: DeserializeOwned>(
        &self,
        about: &About<'_>,
        listing: &str,
        revision: &str,
    ) -> Result<Vec<T>> {
        let mut all = Vec::new();
        let mut page = Some(self.listing_address(about, listing, revision)?);
        while let Some(address) = page {
            let (entries, next) = self.ask(about, || self.page(&address)).await?;
            all.extend::<Vec<T>>(entries);
            page = next;
        }
        Ok(all)
    }

    fn listing_address(&self, about: &About<'_>, listing: &str, revision: &str) -> Result<Url> {
        let endpoint = &self.settings.endpoint;
        let unusable =
            |problem: &str| HubError::Unreachable { endpoint: endpoint.clone(), problem: problem.into() };
        let mut address = Url::parse(endpoint).map_err(|error| unusable(&error.to_string()))?;
        let (owner, name) = (about.reference.owner(), about.reference.name());
        let mut path = address.path_segments_mut().map_err(|()| unusable("it is no address"))?;
        path.pop_if_empty().extend(["api", about.kind.plural(), owner, name, listing, revision]);
        drop(path);
        if listing == "tree" {
            address.set_query(Some("recursive=true"));
        }
        Ok(address)
    }

    /// One page, and where the next one is.
    async fn page<T: DeserializeOwned>(&self, address: &Url) -> Result<(Vec<T>, Option<Url>), Problem> {
        let answer = self.get(address).await?;
        let links = answer.headers().get_all(LINK).iter().filter_map(|links| links.to_str().ok());
        let next = links.flat_map(|links| links.split(',')).find(|link| link.contains("rel=\"next\""));
        let next = next.and_then(|link| {
            let link = link.split_once('<')?.1.split_once('>')?.0;
            // The token goes along, and so nowhere else.
            address.join(link).ok().filter(|next| next.origin() == address.origin())
        });
        let entries = answer.json().await.map_err(|error| Problem::from(&error))?;
        Ok((entries, next))
    }
}
